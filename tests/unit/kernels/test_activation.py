"""Activations against plain formulas in float64, as autograd functions and written into buffers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.activation import NAMES, activate, activate_backward_into, activate_into, gated, swiglu

FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: gate * gate.sigmoid() * up,
    "geglu": lambda gate, up: gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up,
    "gelu": lambda gate, up: up * 0.5 * (1 + torch.erf(up / 2**0.5)),
    "relu": lambda gate, up: up * (up > 0),
    "relu2": lambda gate, up: (up * (up > 0)) ** 2,
    "gelu_tanh": lambda gate, up: up * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3))),
    "clamped_swiglu": lambda gate, up: clamped(gate, -torch.inf) * clamped_sigmoid(gate) * (clamped(up, -7.0) + 1),
}


def clamped(x: Tensor, low: float) -> Tensor:
    return torch.where(x > 7, 7.0, torch.where(x < low, low, x))


def clamped_sigmoid(gate: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-1.702 * clamped(gate, -torch.inf)))


def example(name: str) -> tuple[list[Tensor], Tensor]:
    """(inputs, gradient): gate and up, or up alone; with some beyond where they are clamped."""
    count, size = (2 if gated(name) else 1), (8.0 if name.startswith("clamped") else 1.0)
    inputs = [(size * torch.randn(5, 3, dtype=torch.float64)).requires_grad_() for _ in range(count)]
    assert size == 1 or all(bool((t > 7).any() and (t < -7).any()) for t in inputs)
    return inputs, torch.randn(5, 3, dtype=torch.float64)


def call(name: str, inputs: list[Tensor]) -> Tensor:
    return activate(inputs[-1], name, inputs[0] if gated(name) else None)


def test_every_name_has_a_formula() -> None:
    assert set(FORMULAS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name: str) -> None:
    inputs, grad = example(name)
    expected, actual = FORMULAS[name](inputs[0], inputs[-1]), call(name, inputs)
    torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, grad), wanted)
    assert torch.autograd.gradcheck(lambda *inputs: call(name, inputs), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_into_buffers(name: str) -> None:
    inputs, grad = example(name)
    expected = FORMULAS[name](inputs[0], inputs[-1])
    wanted = torch.autograd.grad(expected, inputs, grad)
    out, again, *grads = (torch.full_like(grad, torch.nan) for _ in range(2 + len(inputs)))
    with torch.no_grad():
        gate, up = inputs[0] if gated(name) else None, inputs[-1]
        assert activate_into(gate, up, name, out) is out
        kept = grad.clone()
        activate_backward_into(grad, gate, up, name, again, grads[0] if gated(name) else None, grads[-1])
    assert torch.equal(grad, kept)
    for actual in (out, again):
        torch.testing.assert_close(actual, expected.detach())
    torch.testing.assert_close(grads, list(wanted))


def test_swiglu_of_two_tensors() -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh': choose one of swiglu, geglu, gelu, relu, relu2"):
        activate(torch.zeros(1), "tanh")


@pytest.mark.parametrize(("name", "gate"), [("swiglu", None), ("relu", torch.zeros(1))])
def test_gate_must_fit(name: str, gate: Tensor | None) -> None:
    with pytest.raises(ValueError, match=f"activation '{name}' (needs a|takes no) gate"):
        activate(torch.zeros(1), name, gate)
