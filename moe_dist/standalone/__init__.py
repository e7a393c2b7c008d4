"""Layers and models for anybody's PyTorch program, without the trainer: thin faces over the rooms below.

Their signatures are those of the documents in tests/examples/documents, and are kept.
"""
