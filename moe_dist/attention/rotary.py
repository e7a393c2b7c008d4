"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves rotated against each other.

Legend: B batch, S sequence, H heads, P width of a head.
"""

from math import ceil, floor, log, pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FAST, _SLOW = 32, 1  # YaRN: turns over the original length from which a rotation is fast, up to which it is slow


class RotaryScaling(NamedTuple):
    """For sequences `factor` times longer than those first trained on, of original_len tokens (for yarn)."""

    kind: Literal["none", "linear", "ntk", "yarn"] = "none"
    factor: float = 1.0
    original_len: int | None = None


def rotary_table(
    positions_BS: Tensor, head_dim: int, theta: float, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [..., S, P / 2] in fp32 (float64 for float64 positions): angle = position * frequency_i, with
    frequency_i = theta^(-2 i / P), or what `scaling` makes of it for sequences that are longer than the first ones."""
    wide = positions_BS.dtype if positions_BS.is_floating_point() else torch.float32
    frequency, size = _frequencies(head_dim, theta, scaling or RotaryScaling(), positions_BS.device)
    angles = positions_BS.double()[..., None] * frequency
    return (angles.cos() * size).to(wide), (angles.sin() * size).to(wide)


def _frequencies(head_dim: int, theta: float, scaling: RotaryScaling, device: torch.device) -> tuple[Tensor, float]:
    """([P / 2] float64, what queries and keys are multiplied by). Made on the device: a copy would wait for it.

    linear: positions / factor (arXiv 2306.15595). ntk: theta * factor^(P / (P - 2)), which keeps the fastest rotation
    and divides the slowest by the factor. yarn: rotations that make fewer than 1 turn over the original length are
    divided, those of more than 32 stay, in between a mixture that is linear in i; scores grow by the square of
    0.1 ln(factor) + 1 (arXiv 2309.00071, section 3, with the ramp of the authors' code).
    """
    factor, index = scaling.factor, torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    if scaling.kind == "ntk" and head_dim > 2:
        theta = theta * factor ** (head_dim / (head_dim - 2))
    frequency = theta ** (-2 * index / head_dim)
    if scaling.kind == "linear":
        return frequency / factor, 1.0
    if scaling.kind != "yarn":
        return frequency, 1.0
    length = scaling.original_len
    assert length is not None, "config/rules/attention.py asks for it"
    # The i whose rotation makes so many turns over the original length.
    fast, slow = (head_dim * log(length / (turns * 2 * pi)) / (2 * log(theta)) for turns in (_FAST, _SLOW))
    first, last = max(floor(fast), 0), min(ceil(slow), head_dim - 1)
    divided = ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequency * (1 - divided) + frequency / factor * divided, 0.1 * log(factor) + 1


def apply_rotary(x_BSHP: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x_i, x_{i + P/2}) by its position's angle. table: [S, P / 2], or [B, S, P / 2]."""
    return _Rotate.apply(x_BSHP, *(t[..., None, :].to(x_BSHP.dtype) for t in table))


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
