"""Activations against plain formulas in float64, as autograd functions and written into buffers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.activation import activate, activate_backward_into, activate_into, input_width, swiglu

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x[..., : x.shape[-1] // 2] * x[..., : x.shape[-1] // 2].sigmoid() * x[..., x.shape[-1] // 2 :],
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x * (x > 0),
}


def example(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, input_width(3, name), dtype=torch.float64, requires_grad=True)
    return x, torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient(name: str) -> None:
    x, grad = example(name)
    expected = FORMULAS[name](x)
    torch.testing.assert_close(activate(x, name), expected)
    torch.testing.assert_close(torch.autograd.grad(activate(x, name), x, grad), torch.autograd.grad(expected, x, grad))
    assert torch.autograd.gradcheck(lambda x: activate(x, name), x)


@pytest.mark.parametrize("name", FORMULAS)
def test_into_buffers(name: str) -> None:
    x, grad = example(name)
    expected = FORMULAS[name](x)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    out, again, grad_x = (
        torch.full_like(grad, torch.nan),
        torch.full_like(grad, torch.nan),
        torch.full_like(x, torch.nan),
    )
    assert activate_into(x.detach(), name, out) is out
    activate_backward_into(x.detach(), grad.clone(), name, out=again, grad_x=grad_x)
    for actual in (out, again):
        torch.testing.assert_close(actual, expected.detach())
    torch.testing.assert_close(grad_x.detach(), expected_grad)


def test_swiglu_of_two_tensors() -> None:
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh': choose one of swiglu, gelu, relu"):
        activate(torch.zeros(1), "tanh")
