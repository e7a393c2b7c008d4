"""Counting sort, gather and combine kernels against sums written out in float64, with dropped assignments."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.triton import combine_rows, gather_rows, sort_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 1), (2, 5), (3, 8), (8, 60), (4, 128)]  # top_k, num_experts
# The kernels take 256 assignments at a time: the longest of each size make 2 to 4 such blocks.
LENGTHS = [(length, *size) for size in SIZES for length in (0, 1, 67, 300) if length * size[0] <= 1000]


def check_order(experts_XK: Tensor, kept_XK: Tensor | None, num_experts: int) -> None:
    found = sort_rows(experts_XK, kept_XK, num_experts)
    everything = torch.ones_like(experts_XK, dtype=torch.bool)
    wanted = RowOrder.of(experts_XK, everything if kept_XK is None else kept_XK, num_experts)
    check_equal(found, wanted)
    if kept_XK is not None:  # as many rows as the host likes: those past the kept ones are any valid index
        rows = len(wanted.slots_R)
        for more in (rows, (rows + kept_XK.numel()) // 2, kept_XK.numel()):
            for bound in (sort(experts_XK, kept_XK, num_experts, more) for sort in (sort_rows, RowOrder.of)):
                assert bound.fullest == more and len(bound.slots_R) == more
                assert more == 0 or 0 <= bound.slots_R.min() <= bound.slots_R.max() < kept_XK.numel()
                check_equal(replace(bound, slots_R=bound.slots_R[:rows], fullest=None), wanted)


def check_equal(found: RowOrder, wanted: RowOrder) -> None:
    assert found.fullest is None and wanted.fullest is None
    for name in ("counts_e", "slots_R", "rows_XK", "kept_XK"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def some_assignments(
    length: int, top_k: int, num_experts: int, kept_share: float | None
) -> tuple[Tensor, Tensor | None]:
    experts_XK = torch.randint(num_experts, (length, top_k), device=DEVICE)
    return experts_XK, None if kept_share is None else torch.rand(length, top_k, device=DEVICE) < kept_share


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length, top_k, num_experts", LENGTHS)
@pytest.mark.parametrize("kept_share", [None, 0.6, 0.0])
def test_sort(length: int, top_k: int, num_experts: int, kept_share: float | None) -> None:
    check_order(*some_assignments(length, top_k, num_experts, kept_share), num_experts)


@pytest.mark.usefixtures("poisoned")
def test_sort_all_on_one_expert_and_dropped_ones_anywhere() -> None:
    check_order(torch.full((300, 2), 7, device=DEVICE), None, 8)
    experts_XK, kept_XK = some_assignments(300, 2, 4, 0.5)
    experts_XK[~kept_XK] = 1_000_000  # an expert of another rank: never looked at
    check_order(experts_XK, kept_XK, 4)
    check_order(experts_XK.int(), kept_XK, 4)
    check_order(experts_XK.t().contiguous().t(), kept_XK, 4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(0, 300),
    top_k=st.integers(1, 3),
    num_experts=st.integers(1, 40),
    kept_share=st.none() | st.sampled_from([0.0, 0.1, 0.9]),
)
def test_sort_anything(seed: int, length: int, top_k: int, num_experts: int, kept_share: float | None) -> None:
    torch.manual_seed(seed)
    check_order(*some_assignments(length, top_k, num_experts, kept_share), num_experts)


def combine_plainly(rows_RD: Tensor, weights_XK: Tensor, order: RowOrder) -> Tensor:
    y_XD = rows_RD.new_zeros(order.rows_XK.shape[0], rows_RD.shape[1])
    for k in range(order.rows_XK.shape[1]):
        at_X = order.kept_XK[:, k].nonzero()[:, 0]
        y_XD = y_XD.index_add(0, at_X, weights_XK[at_X, k, None] * rows_RD[order.rows_XK[at_X, k]])
    return y_XD


def check_pair(actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length, width", [(0, 8), (1, 1), (67, 40), (7, 600)])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("kept_share", [None, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_and_combine(length: int, width: int, top_k: int, kept_share: float | None, dtype: torch.dtype) -> None:
    order = sort_rows(*some_assignments(length, top_k, 8, kept_share), 8)
    x_XD = torch.randn(length, width, device=DEVICE, dtype=dtype, requires_grad=True)
    wide_XD = x_XD.detach().double().requires_grad_()
    rows_RD, wanted_RD = gather_rows(x_XD, order), wide_XD[order.source_R]
    assert rows_RD.dtype == dtype and torch.equal(rows_RD.double(), wanted_RD)
    grad_RD = torch.randn_like(rows_RD)
    grad_x, again = (torch.autograd.grad(gather_rows(x_XD, order), x_XD, grad_RD)[0] for _ in range(2))
    assert grad_x.dtype == dtype and torch.equal(grad_x, again)
    check_pair([grad_x], list(torch.autograd.grad(wanted_RD, wide_XD, grad_RD.double())), dtype)

    rows_RD = torch.randn_like(rows_RD).requires_grad_()
    weights_XK = torch.rand(length, top_k, device=DEVICE, requires_grad=True)
    wide_RD, wide_XK = rows_RD.detach().double().requires_grad_(), weights_XK.detach().double().requires_grad_()
    y_XD, wanted_XD = combine_rows(rows_RD, weights_XK, order), combine_plainly(wide_RD, wide_XK, order)
    grad_XD = torch.randn_like(y_XD)
    found = [y_XD, *torch.autograd.grad(y_XD, (rows_RD, weights_XK), grad_XD)]
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]
    grads = torch.autograd.grad(
        wanted_XD, (wide_RD, wide_XK), grad_XD.double(), allow_unused=True, materialize_grads=True
    )
    check_pair(found, [wanted_XD, *grads], dtype)
    y_again = combine_rows(rows_RD, weights_XK, order)
    repeated = [y_again, *torch.autograd.grad(y_again, (rows_RD, weights_XK), grad_XD)]
    assert all(map(torch.equal, found, repeated))
    if kept_share == 0.0:
        assert not any(tensor.any() for tensor in found)


@pytest.mark.usefixtures("poisoned")
def test_gather_and_combine_many_rows() -> None:
    test_gather_and_combine(300, 64, 2, 0.5, torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kept_share", [None, 0.5, 0.0])
def test_combine_without_weights(kept_share: float | None) -> None:
    order = sort_rows(*some_assignments(67, 3, 8, kept_share), 8)
    rows_RD = torch.randn(len(order.slots_R), 40, device=DEVICE, requires_grad=True)
    wide_RD = rows_RD.detach().double().requires_grad_()
    y_XD = combine_rows(rows_RD, None, order)
    wanted_XD = combine_plainly(wide_RD, torch.ones(67, 3, device=DEVICE, dtype=torch.float64), order)
    (grad,) = torch.autograd.grad(y_XD.sum(), rows_RD)  # an expanded gradient
    check_pair([y_XD, grad], [wanted_XD, torch.ones_like(wide_RD)], torch.float32)


def test_bfloat16_sums_in_fp32_and_weights_may_be_bfloat16() -> None:
    order = sort_rows(torch.tensor([[0, 1, 2]], device=DEVICE), None, 3)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], device=DEVICE, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    weights_XK = torch.ones(1, 3, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y_XD = combine_rows(rows_RD, weights_XK, order)
    assert y_XD.item() == 258.0
    y_XD.sum().backward()
    assert weights_XK.grad.tolist() == [[256.0, 1.0, 1.0]]
    assert weights_XK.grad.dtype == torch.bfloat16


def test_rows_past_two_to_the_31st_number() -> None:
    """Tensors of more than 2^31 numbers; on CPU only the pages that hold the last rows are ever touched."""
    width, length = 2**15, 2**16 + 2
    last = torch.tensor([[length - 1], [length - 2]], device=DEVICE)
    everything = torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    tall_XD = torch.empty(length, width, dtype=torch.bfloat16, device=DEVICE)
    tall_XD[-2:] = torch.tensor([[2.0], [3.0]], device=DEVICE).bfloat16()

    order = RowOrder(everything.sum(0), last.flatten(), last.new_zeros(length, 1), everything)
    assert torch.equal(gather_rows(tall_XD, order), tall_XD[-2:].flip(0))

    order = RowOrder(everything.sum(0), torch.arange(length, device=DEVICE), last, everything)
    weights_XK = torch.tensor([[2.0], [4.0]], device=DEVICE, requires_grad=True)
    y_XD = combine_rows(tall_XD.requires_grad_(), weights_XK, order)
    assert torch.equal(y_XD, torch.tensor([[6.0], [8.0]], device=DEVICE).expand(2, width).bfloat16())
    grad_tall_XD, grad_weights_XK = torch.autograd.grad(y_XD.sum(), (tall_XD, weights_XK))
    assert torch.equal(grad_tall_XD[-2:], torch.tensor([[4.0], [2.0]]).to(y_XD).expand(2, width))
    assert grad_weights_XK.tolist() == [[3.0 * width], [2.0 * width]]


def test_refuses_float64() -> None:
    order = sort_rows(torch.tensor([[0]], device=DEVICE), None, 1)
    rows = torch.ones(1, 1, device=DEVICE).double()
    for call in (lambda: gather_rows(rows, order), lambda: combine_rows(rows, None, order)):
        with pytest.raises(ValueError, match=r"torch\.float64: use kernels=torch"):
            call()
