"""`gptjax launch`: write the files by which Slurm, Kubernetes or Google Cloud start a run on many hosts."""
