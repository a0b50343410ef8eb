"""Measurements beside a peer: interleaved pairs in one run, each side in a process of its own."""
