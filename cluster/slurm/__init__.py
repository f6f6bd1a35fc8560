"""SLURM as an executor, and its profiles."""
