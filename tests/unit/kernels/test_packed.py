"""Packed attention against the plain oracle in float64, output and all gradients."""

import pytest
import torch

from moe_dist.kernels.attention import packed, reference


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 128, 259])
def test_is_the_oracle(kv_heads: int, length: int) -> None:
    shapes = (2, 4, length, 6), (2, kv_heads, length, 6), (2, kv_heads, length, 6)
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected, actual = reference.attend(*args), packed.attend(*args)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(torch.autograd.grad(actual, args, grad), torch.autograd.grad(expected, args, grad))


def test_gradcheck() -> None:
    args = [torch.randn(1, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(packed.attend, args)
