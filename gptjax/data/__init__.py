"""What a run reads: sources → reading → corpus → batches. Nothing is imported here, so that processes which only
tokenize need not load Grain and JAX."""
