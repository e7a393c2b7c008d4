"""ALiBi: a penalty on scores that grows with distance, in place of position embeddings (arXiv 2108.12409)."""

from math import floor, log2

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """[H] fp32: 2^(-8 h / H) for h = 1..H where H is a power of two; otherwise those of the power of two below it, and
    every second one of the power above (section 3, as in the paper's code)."""
    power = 2 ** floor(log2(num_heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    finer = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * power + 1, 2)]
    return torch.tensor((slopes + finer)[:num_heads], device=device)
