"""`gptjax plan`: predict whether a run fits on given hardware, what bounds its speed, and what it costs."""
