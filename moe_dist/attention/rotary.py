"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34), halves rotated against each other.

Legend: B batch, S sequence, H heads, P width of a head.
"""

from math import ceil, floor, log, pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RotaryScaling(NamedTuple):
    """For sequences `factor` times longer than those first trained on, of original_len tokens (for yarn, llama3 and
    dynamic). fast, slow: turns over that length from which a rotation is fast, up to which it is slow. truncate: yarn's
    ramp between both begins and ends at a whole i. length: of the sequences at hand, for dynamic."""

    kind: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_len: int | None = None
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    length: int = 0


def rotary_table(
    positions_BS: Tensor, head_dim: int, theta: float, scaling: RotaryScaling | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [..., S, P / 2] in fp32 (float64 for float64 positions): angle = position * frequency_i, with
    frequency_i = theta^(-2 i / P), or what `scaling` makes of it for sequences that are longer than the first ones.
    head_dim: P, or as many numbers of a head as are turned."""
    wide = positions_BS.dtype if positions_BS.is_floating_point() else torch.float32
    frequency, size = _frequencies(head_dim, theta, scaling or RotaryScaling(), positions_BS.device)
    angles = positions_BS.double()[..., None] * frequency
    return (angles.cos() * size).to(wide), (angles.sin() * size).to(wide)


def _frequencies(head_dim: int, theta: float, scaling: RotaryScaling, device: torch.device) -> tuple[Tensor, float]:
    """([P / 2] float64, what queries and keys are multiplied by). Made on the device: a copy would wait for it.

    linear: positions / factor (arXiv 2306.15595). ntk: theta * factor^(P / (P - 2)), which keeps the fastest rotation
    and divides the slowest by the factor. dynamic: ntk with factor * length / original_len - (factor - 1), above
    original_len. The others divide slow rotations by the factor, keep fast ones, and mix both in between: yarn linearly
    in i, and scores grow by the square of 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3, with the ramp of the
    authors' code); llama3 linearly in the turns (Llama 3.1, arXiv 2407.21783, its published code).
    """
    factor, index = scaling.factor, torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    if scaling.kind == "dynamic":
        factor = max(1.0, factor * scaling.length / _original(scaling) - (factor - 1))
    if scaling.kind in ("ntk", "dynamic") and head_dim > 2:
        theta = theta * factor ** (head_dim / (head_dim - 2))
    frequency = theta ** (-2 * index / head_dim)
    if scaling.kind == "linear":
        return frequency / factor, 1.0
    if scaling.kind == "yarn":
        divided = _yarn_ramp(index, head_dim, theta, scaling)
        return frequency * (1 - divided) + frequency / factor * divided, 0.1 * log(factor) + 1
    if scaling.kind == "llama3":
        turns = frequency * _original(scaling) / (2 * pi)
        kept = ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
        return frequency * kept + frequency / factor * (1 - kept), 1.0
    return frequency, 1.0


def _yarn_ramp(index: Tensor, head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """From 0 where rotations are fast to 1 where they are slow."""
    length = _original(scaling)
    # The i whose rotation makes so many turns over the original length.
    first, last = (
        head_dim * log(length / (turns * 2 * pi)) / (2 * log(theta)) for turns in (scaling.fast, scaling.slow)
    )
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return ((index - first) / max(last - first, 1e-3)).clamp(0, 1)


def _original(scaling: RotaryScaling) -> int:
    assert scaling.original_len is not None, "config/rules/attention.py asks for it"
    return scaling.original_len


def turn_heads(x_BSHP: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`apply_rotary` to the first numbers of each head, as many as the table has angles for; the others stay."""
    turned = 2 * table[0].shape[-1]
    if turned == x_BSHP.shape[-1]:
        return apply_rotary(x_BSHP, table)
    if turned == 0:
        return x_BSHP
    return torch.cat((apply_rotary(x_BSHP[..., :turned], table), x_BSHP[..., turned:]), dim=-1)


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
