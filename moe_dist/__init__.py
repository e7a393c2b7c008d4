"""moe_dist: distributed training of Mixture-of-Experts transformers, with one meaning in any layout."""

__version__ = "0.1.0"
