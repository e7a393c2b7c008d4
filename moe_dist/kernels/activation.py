"""Activations of feed-forward layers. SwiGLU (arXiv 2002.05202) takes gate and up projections packed side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _SwiGLU(torch.autograd.Function):
    """Saves only its input; the backward pass computes the sigmoid again."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def activate(x: Tensor, name: str) -> Tensor:
    """[..., 2 F] -> [..., F] for swiglu, elementwise otherwise."""
    if name == "swiglu":
        return _SwiGLU.apply(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {name!r}: choose swiglu, gelu or relu")


def input_width(d_ff: int, name: str) -> int:
    """Columns of the first projection: 2 d_ff for the gated activation."""
    return 2 * d_ff if name == "swiglu" else d_ff
