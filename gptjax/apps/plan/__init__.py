"""`gptjax plan`: whether a run fits on hardware that is not here, what bounds it, and what it costs."""
