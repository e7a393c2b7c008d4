"""Gather and combine against sums written out one by one, in float64, with dropped assignments."""

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.permute.reference import combine_rows, gather_rows

D = 3


def a_permutation(tokens: int, top_k: int, kept_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """source_R, rows_TK and kept_TK of a random one; dropped assignments point at row 0."""
    kept_TK = torch.rand(tokens, top_k) < kept_share
    order_R = kept_TK.flatten().nonzero()[:, 0]
    order_R = order_R[torch.randperm(len(order_R))]
    rows_TK = torch.zeros(tokens * top_k, dtype=torch.int64)
    rows_TK[order_R] = torch.arange(len(order_R))
    return order_R // top_k, rows_TK.view(tokens, top_k), kept_TK


@pytest.mark.parametrize("kept_share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gather(top_k: int, kept_share: float) -> None:
    source_R, rows_TK, kept_TK = a_permutation(7, top_k, kept_share)
    x_TD = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    rows_RD = gather_rows(x_TD, source_R, rows_TK, kept_TK)
    assert torch.equal(rows_RD, x_TD[source_R])
    grad = torch.randn_like(rows_RD)
    torch.testing.assert_close(
        torch.autograd.grad(rows_RD, x_TD, grad), torch.autograd.grad(x_TD[source_R], x_TD, grad)
    )
    assert torch.autograd.gradcheck(lambda x_TD: gather_rows(x_TD, source_R, rows_TK, kept_TK), x_TD)


@pytest.mark.parametrize("kept_share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_combine(top_k: int, kept_share: float) -> None:
    source_R, rows_TK, kept_TK = a_permutation(7, top_k, kept_share)
    rows_RD = torch.randn(len(source_R), D, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(7, top_k, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [
            sum((weights_TK[t, k] * rows_RD[rows_TK[t, k]] for k in range(top_k) if kept_TK[t, k]), torch.zeros(D))
            for t in range(7)
        ]
    ).double()
    actual = combine_rows(rows_RD, weights_TK, source_R, rows_TK, kept_TK)
    torch.testing.assert_close(actual, expected)
    if kept_share:
        grad = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (rows_RD, weights_TK), grad)
        for ours, theirs in zip(torch.autograd.grad(actual, (rows_RD, weights_TK), grad), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        args = (rows_RD, weights_TK)
        assert torch.autograd.gradcheck(
            lambda rows, weights: combine_rows(rows, weights, source_R, rows_TK, kept_TK), args
        )
    else:
        actual.sum().backward()
        assert rows_RD.grad is not None
        assert torch.equal(weights_TK.grad, torch.zeros(7, top_k, dtype=torch.float64))


def test_bfloat16_sums_in_fp32() -> None:
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    everything = torch.ones(1, 3, dtype=torch.bool)
    y_TD = combine_rows(rows_RD, torch.ones(1, 3), torch.zeros(3, dtype=torch.int64), torch.arange(3)[None], everything)
    assert y_TD.item() == 258.0
