"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves rotated against each other.

Legend: B batch, S sequence, H heads, P width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_table(positions_S: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [S, P / 2] in fp32 (float64 for float64 positions): angle = position * theta^(-2 i / P)."""
    wide = positions_S.dtype if positions_S.is_floating_point() else torch.float32
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float64) / head_dim
    angles = positions_S.double()[:, None] * (theta**-exponents)
    return angles.cos().to(wide), angles.sin().to(wide)


def apply_rotary(x_BSHP: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + P/2}) by its position's angle. table: [S, P / 2], or [1 or B, S, P / 2]."""
    return _Rotate.apply(x_BSHP, *(t.unsqueeze(-2).to(x_BSHP.dtype) for t in table))


def _rotate(x_BSHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out_BSHP = torch.empty_like(x_BSHP, memory_format=torch.contiguous_format)
    (a, b), (out_a, out_b) = x_BSHP.chunk(2, dim=-1), out_BSHP.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out_BSHP


class _Rotate(torch.autograd.Function):
    """The gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x_BSHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BSHP, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHP: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BSHP, cos, -sin), None, None
