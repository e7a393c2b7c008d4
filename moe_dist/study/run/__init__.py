"""Points that train: here, on Slurm, and seen from another terminal."""
