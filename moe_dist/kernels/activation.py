"""Activations of feed-forward layers and their derivatives, written into given buffers or as autograd functions.

| name           | hidden units                                                                |
|----------------|-----------------------------------------------------------------------------|
| swiglu         | silu(gate) * up (arXiv 2002.05202)                                          |
| geglu          | gelu(gate) * up, gelu by the error function (arXiv 2002.05202)              |
| gelu           | gelu(up), by the error function (arXiv 1606.08415)                          |
| relu           | max(up, 0)                                                                  |
| relu2          | max(up, 0)^2 (arXiv 2109.08668)                                             |
| clamped_swiglu | g * sigmoid(1.702 g) * (u + 1), g = min(gate, 7), u = up cut to -7 .. 7     |
|                | (gpt-oss, arXiv 2508.10925)                                                 |
| gelu_tanh      | up * (1 + tanh(sqrt(2 / pi) (up + 0.044715 up^3))) / 2 (arXiv 1606.08415)   |

Gate and up are two tensors of the same shape. The gated ones keep just these for the backward pass: computing the
activation again costs less than keeping it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMES = ("swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu", "gelu_tanh")
LIMIT, SLOPE = 7.0, 1.702  # of clamped_swiglu

_aten = torch.ops.aten
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # what torch calls them


def gated(name: str) -> bool:
    """Whether the activation multiplies two projections; raises ValueError for a name that is none of NAMES."""
    if name not in NAMES:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(NAMES)}")
    return name in ("swiglu", "geglu", "clamped_swiglu")


def activate(up: Tensor, name: str, gate: Tensor | None = None) -> Tensor:
    """Elementwise, differentiable; `gate` where gated(name) and only there."""
    if gated(name) != (gate is not None):
        raise ValueError(f"activation {name!r} {'needs a' if gate is None else 'takes no'} gate")
    if gate is not None:
        return _Gated.apply(gate, up, name)
    if name in _GELU:
        return F.gelu(up, approximate=_GELU[name])
    return F.relu(up) if name == "relu" else F.relu(up).square()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; keeps its two inputs for the backward pass and nothing else."""
    return _Gated.apply(gate, up, "swiglu")


def activate_into(gate: Tensor | None, up: Tensor, name: str, out: Tensor) -> Tensor:
    """`activate` without autograd: fills `out` and returns it."""
    if gate is not None:
        return _bend(gate, name, out).mul_(_factor(up, name))
    if name in _GELU:
        return _aten.gelu.out(up, approximate=_GELU[name], out=out)
    torch.clamp_min(up, 0, out=out)
    return out if name == "relu" else out.square_()


def activate_backward_into(
    grad: Tensor, gate: Tensor | None, up: Tensor, name: str, out: Tensor, grad_gate: Tensor | None, grad_up: Tensor
) -> None:
    """From the gradient of the activation: the gradients of gate and up, and `out` = the activation once more.

    For relu, `out` may be `up` where that has been activated in place.
    """
    if gate is not None and grad_gate is not None:
        _bend(gate, name, out)
        _factor_backward(torch.mul(grad, out, out=grad_up), up, name)
        factor = _factor(up, name)
        out.mul_(factor)
        torch.mul(grad, factor, out=grad_gate)
        _bend_backward(grad_gate, gate, name)
    elif name in _GELU:
        _aten.gelu.out(up, approximate=_GELU[name], out=out)
        _aten.gelu_backward.grad_input(grad, up, approximate=_GELU[name], grad_input=grad_up)
    else:
        if out is not up:
            torch.clamp_min(up, 0, out=out)
        if name == "relu":
            _aten.threshold_backward.grad_input(grad, up, 0, grad_input=grad_up)
        else:
            torch.mul(grad, out, out=grad_up).mul_(2)
            out.square_()


def _bend(gate: Tensor, name: str, out: Tensor) -> Tensor:
    if name == "clamped_swiglu":
        torch.clamp_max(gate, LIMIT, out=out)
        return out.mul_((SLOPE * out).sigmoid_())
    return (_aten.silu if name == "swiglu" else _aten.gelu).out(gate, out=out)


def _bend_backward(grad: Tensor, gate: Tensor, name: str) -> Tensor:
    """In place: grad becomes the gradient of the gate."""
    if name == "clamped_swiglu":
        clamped = gate.clamp_max(LIMIT)
        sigmoid = (SLOPE * clamped).sigmoid_()
        return grad.mul_(sigmoid + SLOPE * clamped * sigmoid * (1 - sigmoid)).mul_(gate <= LIMIT)
    backward = _aten.silu_backward if name == "swiglu" else _aten.gelu_backward
    return backward.grad_input(grad, gate, grad_input=grad)


def _factor(up: Tensor, name: str) -> Tensor:
    """What the bent gate is multiplied by."""
    return up.clamp(-LIMIT, LIMIT).add_(1) if name == "clamped_swiglu" else up


def _factor_backward(grad: Tensor, up: Tensor, name: str) -> Tensor:
    """In place: grad, of `_factor`, becomes that of up."""
    return grad.mul_(up.abs() <= LIMIT) if name == "clamped_swiglu" else grad


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return _bend(gate, name, torch.empty_like(gate)).mul_(_factor(up, name))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_up = _factor_backward(_bend(gate, ctx.name, torch.empty_like(gate)).mul_(grad), up, ctx.name)
        return _bend_backward(grad * _factor(up, ctx.name), gate, ctx.name), grad_up, None
