"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves rotated against each other.

Legend: B batch, S sequence, H heads, P width of a head.
"""

import torch
from torch import Tensor


def rotary_table(positions_S: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [S, P / 2] in fp32 (float64 for float64 positions): angle = position * theta^(-2 i / P)."""
    wide = positions_S.dtype if positions_S.is_floating_point() else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float64) / head_dim
    angles = positions_S.double()[:, None] * (theta**-exponents)
    return angles.cos().to(wide), angles.sin().to(wide)


def apply_rotary(x_BSHP: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + P/2}) by its position's angle."""
    cos, sin = (t[:, None, :].to(x_BSHP.dtype) for t in table)
    a, b = x_BSHP.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
