"""Gather and combine against sums written out one by one, in float64, with dropped assignments."""

import pytest
import torch

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import combine_rows, gather_rows

D = 3


def an_order(tokens: int, top_k: int, kept_share: float) -> RowOrder:
    """Random experts of 4; dropped assignments point at row 0."""
    kept_TK = torch.rand(tokens, top_k) < kept_share
    return RowOrder.of(torch.randint(4, (tokens, top_k)), kept_TK, num_experts=4)


@pytest.mark.parametrize("kept_share", [1.0, 0.5, 0.0])
def test_order_by_a_plain_sort(kept_share: float) -> None:
    experts_TK = torch.randint(5, (13, 3))
    kept_TK = torch.rand(13, 3) < kept_share
    order = RowOrder.of(experts_TK, kept_TK, num_experts=5)
    experts, kept = experts_TK.flatten().tolist(), kept_TK.flatten().tolist()
    slots = sorted((n for n in range(39) if kept[n]), key=lambda n: experts[n])
    assert order.slots_R.tolist() == slots
    assert order.source_R.tolist() == [n // 3 for n in slots]
    assert order.rows_per_expert == tuple(sum(experts[n] == e for n in slots) for e in range(5))
    assert [order.rows_XK.flatten()[n] for n in slots] == list(range(len(slots)))


@pytest.mark.parametrize("kept_share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gather(top_k: int, kept_share: float) -> None:
    order = an_order(7, top_k, kept_share)
    source_R = order.source_R
    x_TD = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    rows_RD = gather_rows(x_TD, order)
    assert torch.equal(rows_RD, x_TD[source_R])
    grad = torch.randn_like(rows_RD)
    torch.testing.assert_close(
        torch.autograd.grad(rows_RD, x_TD, grad), torch.autograd.grad(x_TD[source_R], x_TD, grad)
    )
    assert torch.autograd.gradcheck(lambda x_TD: gather_rows(x_TD, order), x_TD)


@pytest.mark.parametrize("kept_share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_combine(top_k: int, kept_share: float) -> None:
    order = an_order(7, top_k, kept_share)
    source_R, rows_TK, kept_TK = order.source_R, order.rows_XK, order.kept_XK
    rows_RD = torch.randn(len(source_R), D, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(7, top_k, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            sum((weights_TK[t, k] * rows_RD[rows_TK[t, k]] for k in range(top_k) if kept_TK[t, k]), torch.zeros(D))
            for t in range(7)
        ]
    ).double()
    actual = combine_rows(rows_RD, weights_TK, order)
    torch.testing.assert_close(actual, expected)
    if kept_share:
        grad = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (rows_RD, weights_TK), grad)
        for ours, theirs in zip(torch.autograd.grad(actual, (rows_RD, weights_TK), grad), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        args = (rows_RD, weights_TK)
        assert torch.autograd.gradcheck(lambda rows, weights: combine_rows(rows, weights, order), args)
        ones_TK = torch.ones(7, top_k, dtype=torch.float64)
        torch.testing.assert_close(combine_rows(rows_RD, None, order), combine_rows(rows_RD, ones_TK, order))
        assert torch.autograd.gradcheck(lambda rows: combine_rows(rows, None, order), rows_RD)
    else:
        actual.sum().backward()
        assert rows_RD.grad is not None
        assert torch.equal(weights_TK.grad, torch.zeros(7, top_k, dtype=torch.float64))


def test_bfloat16_sums_in_fp32() -> None:
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    order = RowOrder.of(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), num_experts=1)
    assert combine_rows(rows_RD, torch.ones(1, 3), order).item() == 258.0
