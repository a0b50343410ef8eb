"""`gptjax serve`: a model behind the HTTP interface of OpenAI (docs/serving.md)."""
