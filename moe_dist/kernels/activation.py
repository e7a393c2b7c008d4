"""Activations of feed-forward layers and their derivatives, written into given buffers or as autograd functions.

SwiGLU (arXiv 2002.05202), silu(gate) * up, takes both projections packed side by side, [..., 2 F] -> [..., F]. The
others are elementwise. Saving only the input and computing the activation again costs less than keeping it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMES = ("swiglu", "gelu", "relu")


def input_width(d_ff: int, name: str) -> int:
    """Columns of the first projection: 2 d_ff for the gated activation."""
    return 2 * d_ff if name == "swiglu" else d_ff


def activate(x: Tensor, name: str) -> Tensor:
    """[..., 2 F] -> [..., F] for swiglu, elementwise otherwise."""
    if name == "swiglu":
        return swiglu(*x.chunk(2, dim=-1))
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(NAMES)}")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; keeps its two inputs for the backward pass and nothing else."""
    return _SwiGLU.apply(gate, up)


def activate_into(x: Tensor, name: str, out: Tensor) -> Tensor:
    """`activate` without autograd: fills `out`, [..., F], and returns it."""
    if name == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=out)
        return out.mul_(up)
    if name == "gelu":
        return torch.ops.aten.gelu.out(x, out=out)
    return torch.clamp_min(x, 0, out=out)


def activate_backward_into(x: Tensor, grad: Tensor, name: str, out: Tensor, grad_x: Tensor) -> None:
    """From x and the gradient of the activation, both: `out` = the activation again, `grad_x` = the gradient of x.

    x and grad_x: [..., 2 F] for swiglu; grad and out: [..., F]. `grad` is overwritten.
    """
    if name == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=out)
        torch.mul(grad, out, out=grad_up)
        out.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    elif name == "gelu":
        torch.ops.aten.gelu.out(x, out=out)
        torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad_x)
    else:
        torch.clamp_min(x, 0, out=out)
        torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
