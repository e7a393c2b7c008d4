"""The RMSNorm kernel and its plain reference against the formula in float64: output and both gradients."""

import pytest
import torch
import torch.nn.functional as F

from moe_dist.kernels.norm import reference
from moe_dist.kernels.norm.triton import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 40), (67, 64), (300, 100), (3, 5, 33), (7, 2000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x_TD = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
    scale_D = (0.5 + torch.rand(shape[-1], device=DEVICE)).to(dtype).requires_grad_()
    wide_x, wide_scale = (tensor.detach().double().requires_grad_() for tensor in (x_TD, scale_D))
    expected = F.rms_norm(wide_x, shape[-1:], wide_scale, EPS)
    grad = torch.randn_like(x_TD)
    wanted = (expected, *torch.autograd.grad(expected, (wide_x, wide_scale), grad.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):
        actual = rms_norm(x_TD, scale_D, EPS)
        found = (actual, *torch.autograd.grad(actual, (x_TD, scale_D), grad))
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reference.rms_norm(wide_x, wide_scale, EPS), expected)


@pytest.mark.usefixtures("poisoned")
def test_the_same_bits_twice() -> None:
    x_TD = torch.randn(300, 100, device=DEVICE, requires_grad=True)
    scale_D = torch.rand(100, device=DEVICE, requires_grad=True)
    grad = torch.randn_like(x_TD)
    first, second = (torch.autograd.grad(rms_norm(x_TD, scale_D, EPS), (x_TD, scale_D), grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.usefixtures("poisoned")
def test_a_program_visits_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.kernels.norm.triton._PROGRAMS", 2)
    test_against_float64((300, 100), torch.float32)
    monkeypatch.setattr("moe_dist.kernels.norm.triton._PROGRAMS", 3)
    test_against_float64((7, 2000), torch.bfloat16)


def test_mixed_precision_strides_and_expanded_gradients() -> None:
    x_TD = torch.randn(12, 40, device=DEVICE).bfloat16().t().requires_grad_()
    scale_D = torch.rand(12, device=DEVICE, requires_grad=True)
    y_TD = rms_norm(x_TD, scale_D, EPS)
    assert y_TD.dtype == torch.bfloat16
    y_TD.sum().backward()
    wide_x, wide_scale = (tensor.detach().double().requires_grad_() for tensor in (x_TD, scale_D))
    F.rms_norm(wide_x, (12,), wide_scale, EPS).sum().backward()
    assert (x_TD.grad.dtype, scale_D.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(x_TD.grad.double(), wide_x.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(scale_D.grad.double(), wide_scale.grad, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"row of 10000 numbers .* 8192: use kernels=torch"):
        rms_norm(torch.zeros(2, 10000, device=DEVICE), torch.zeros(10000, device=DEVICE), EPS)
    with pytest.raises(ValueError, match=r"torch\.float64: use kernels=torch"):
        rms_norm(torch.zeros(2, 4, device=DEVICE).double(), torch.zeros(4, device=DEVICE), EPS)
