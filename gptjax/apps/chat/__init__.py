"""`gptjax chat`: a conversation in the terminal."""
