"""ALiBi: a penalty on scores that grows with the distance, a different one for each head (arXiv 2108.12409).

Legend: H query heads, K keys.
"""

import torch
from torch import Tensor


def alibi_slopes(heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """[H]: 2^(-8 i / n) for i = 1..n, n the largest power of two up to H; the heads beyond take every other slope of
    2n heads, as the paper's code does."""
    if heads < 1:
        raise ValueError(f"heads={heads} is below 1")
    n = 1 << (heads.bit_length() - 1)
    exponents = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (heads - n), 2)]
    return torch.exp2(-torch.tensor(exponents, dtype=torch.float64, device=device)).to(dtype)


def alibi_bias(
    heads: int,
    keys: int,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What ALiBi adds to scores, for `bias` of an attention layer.

    causal: [1, H, 1, K], slope * (j - (K - 1)) for key j: under a causal mask every query's softmax is that of the
    distances, because scores may be shifted by a number of the query. Otherwise the full form [1, H, K, K],
    -slope * |i - j|. Both may be longer than the attention they are given to; their last entries are used.
    """
    slopes_H11 = alibi_slopes(heads, torch.float64, device)[:, None, None]
    at_K = torch.arange(keys, device=device)
    far = (keys - 1 - at_K)[None] if causal else (at_K[:, None] - at_K).abs()
    return (-slopes_H11 * far)[None].to(dtype)
