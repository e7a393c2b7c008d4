"""Every grouped product against the loop of plain products, outputs and all gradients."""

import pytest
import torch

from moe_dist.kernels.grouped_mm.reference import bmm, grouped_mm, loop

COUNTS = {
    "uneven": (3, 1, 18, 7),
    "empty experts": (0, 4, 0, 2, 0),
    "all on one": (0, 0, 19),
    "whole blocks": (16, 32),
    "a single expert": (6,),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
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
