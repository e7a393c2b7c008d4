"""Faults on cue in real training runs, and the proof that nothing was lost."""
