"""Hand-written gradients of RMSNorm and rotary embedding against autograd's of the formulas, in float64."""

import pytest
import torch
import torch.nn.functional as F

from moe_dist.attention.rotary import apply_rotary, rotary_table
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.norm import RMSNorm


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(6, 1e-3, single_process_mesh()).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, actual = F.rms_norm(x, (6,), norm.weight, 1e-3), norm(x)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, norm.weight), grad)
    for ours, theirs in zip(torch.autograd.grad(actual, (x, norm.weight), grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rms_norm_is_fp32_inside() -> None:
    norm = RMSNorm(64, 1e-5, single_process_mesh())
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.bfloat16()
    x = torch.randn(9, 64).bfloat16().requires_grad_()
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    actual, expected = norm(x), F.rms_norm(wide, (64,), weight, 1e-5)
    grad = torch.randn(9, 64).bfloat16()
    pairs = zip(
        (actual, *torch.autograd.grad(actual, (x, norm.weight), grad)),
        (expected, *torch.autograd.grad(expected, (wide, weight), grad.double())),
        strict=True,
    )
    for ours, theirs in pairs:  # one rounding, to bfloat16, of numbers that are right in fp32
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_rotary_gradient() -> None:
    table = rotary_table(torch.arange(5, dtype=torch.float64), head_dim=6, theta=100.0)
    x_BSHP = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table), x_BSHP)
    strided = x_BSHP.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert torch.equal(apply_rotary(strided, table), apply_rotary(x_BSHP, table))
