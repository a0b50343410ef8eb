"""Scaling laws as published, and their fits to a table of runs. Numbers in, numbers out; no JAX, nothing printed."""
