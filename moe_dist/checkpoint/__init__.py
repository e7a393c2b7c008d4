"""Checkpoints: every rank writes the ranges it owns, a manifest names them all, any layout reads what it needs."""
