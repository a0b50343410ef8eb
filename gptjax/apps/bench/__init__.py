"""`gptjax bench`: measure against a peer in interleaved pairs, each side in a process of its own."""
