"""`gptjax data`: corpora made ready once, for many runs. Training needs only what `gptjax/data` has."""
