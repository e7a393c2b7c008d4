"""Runs as jobs of Slurm: handing in, starting again after faults, asking how far it is, ending in order."""
