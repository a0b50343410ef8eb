"""The files by which Slurm, Kubernetes or Google Cloud start a run on many hosts. The engine is JAX's own runtime."""
