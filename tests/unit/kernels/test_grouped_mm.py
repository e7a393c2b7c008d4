"""Every way of running the experts against the loop of plain products, outputs and all gradients."""

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.activation import activate, input_width
from moe_dist.kernels.grouped_mm import cpu
from moe_dist.kernels.grouped_mm.reference import bmm, grouped_mm, loop

D, F = 5, 3
COUNTS = {
    "uneven": (3, 1, 18, 7),
    "empty experts": (0, 4, 0, 2, 0),
    "all on one": (0, 0, 19),
    "whole blocks": (16, 32),
    "a single expert": (6,),
    "no rows": (0, 0),
}
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def inputs(
    counts: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (sum(counts), D), (len(counts), D, input_width(F, activation)), (len(counts), F, D)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)


def plain(rows_RD: Tensor, w_in_eDH: Tensor, w_out_eFD: Tensor, counts: tuple[int, ...], activation: str) -> Tensor:
    return loop(activate(loop(rows_RD, w_in_eDH, counts), activation), w_out_eFD, counts)


@every_count
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_fused_feed_forward_is_the_loop(counts: tuple[int, ...], activation: str) -> None:
    args = inputs(counts, activation)
    expected, actual = plain(*args, counts, activation), cpu.feed_forward(*args, counts, activation)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, grad)
    for ours, theirs in zip(torch.autograd.grad(actual, args, grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_count
def test_padding_to_blocks_changes_nothing(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_block", lambda dtype: 4)
    test_fused_feed_forward_is_the_loop(counts, "swiglu")


@every_count
def test_bfloat16(counts: tuple[int, ...]) -> None:
    args = inputs(counts, "swiglu", torch.bfloat16)
    wide = [arg.detach().double().requires_grad_() for arg in args]
    actual, expected = cpu.feed_forward(*args, counts, "swiglu"), plain(*wide, counts, "swiglu")
    grad = torch.randn_like(actual)
    wanted = (expected, *torch.autograd.grad(expected, wide, grad.double()))
    for ours, theirs in zip((actual, *torch.autograd.grad(actual, args, grad)), wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 0.01 * theirs.norm()


def test_idle_experts_get_zero_gradients_in_used_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come uninitialised: filled with NaN, nothing of it may be left."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: empty(*args).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args: empty_like(*args).fill_(torch.nan))
    for dtype in (torch.float64, torch.bfloat16):
        args = inputs((0, 3, 0), "swiglu", dtype)
        out = cpu.feed_forward(*args, (0, 3, 0), "swiglu")
        grads = torch.autograd.grad(out.sum(), args)
        assert all(tensor.isfinite().all() for tensor in (out, *grads))
        assert all((grad[[0, 2]] == 0).all() for grad in grads[1:])


def test_gradcheck() -> None:
    counts = (2, 0, 3)
    args = inputs(counts, "swiglu")
    assert torch.autograd.gradcheck(lambda *args: cpu.feed_forward(*args, counts, "swiglu"), args)


def test_gradient_may_come_strided() -> None:
    args = inputs((2, 3), "relu")
    grad = torch.randn(D, 5, dtype=torch.float64).t()
    ours = torch.autograd.grad(cpu.feed_forward(*args, (2, 3), "relu"), args, grad)
    torch.testing.assert_close(ours, torch.autograd.grad(plain(*args, (2, 3), "relu"), args, grad))


@pytest.mark.parametrize("counts", [counts for counts in COUNTS.values() if sum(counts)])
@pytest.mark.parametrize(("matmul", "dtype"), [(bmm, torch.float64), (grouped_mm, torch.float32)])
def test_products_are_the_loop(matmul: object, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    rows_RK = torch.randn(sum(counts), 8, dtype=dtype, requires_grad=True)
    weight_eKN = torch.randn(len(counts), 8, 4, dtype=dtype, requires_grad=True)
    expected, actual = loop(rows_RK, weight_eKN, counts), matmul(rows_RK, weight_eKN, counts)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (rows_RK, weight_eKN), grad),
        torch.autograd.grad(expected, (rows_RK, weight_eKN), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
