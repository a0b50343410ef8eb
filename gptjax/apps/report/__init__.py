"""`gptjax report` and `gptjax compare`: pages about one run, and about several runs side by side."""
