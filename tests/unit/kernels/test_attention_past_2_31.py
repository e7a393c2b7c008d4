"""Offsets past 2^31: rows, heads and tokens that lie behind numbers which nobody touches.

On CPU those are address space without memory behind it.
"""

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.attention import reference
from moe_dist.kernels.attention.pattern import Pattern
from moe_dist.kernels.attention.triton import attend
from moe_dist.kernels.attention.triton_call import AttentionTiling, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = AttentionTiling(Tile(16, 16), Tile(16, 16), Tile(16, 16))
FAR, P = 2**31, 16


def far(shape: tuple[int, ...], dim: int) -> Tensor:
    """[2, .., P] whose second index of one dim is FAR numbers from its first."""
    strides = [P * 2**i for i in range(len(shape) - 1)] + [1]
    strides[dim] = FAR
    tensor = torch.empty(FAR + 1024, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
    return tensor.copy_(torch.randn(shape, device=DEVICE)).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 2, 2), (2, 0, 2)])
def test_far_rows_heads_and_tokens(dims: tuple[int, int, int]) -> None:
    shapes = ((2, 2, 2, P), (2, 1, 2, P), (2, 1, 2, P))
    tensors = [far(shape, dim) for shape, dim in zip(shapes, dims, strict=True)]
    out = attend(*tensors, Pattern(), tiling=SMALL)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.attend(*doubles)
    weight = torch.randn_like(expected)
    found = [out, *torch.autograd.grad((out * weight).sum(), tensors)]
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), doubles)]
    for actual, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), oracle, rtol=0, atol=2e-2)
