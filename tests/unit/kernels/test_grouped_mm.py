"""Every grouped product against the loop of plain products, outputs and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.grouped_mm.reference import bmm, grouped_mm, loop
from moe_dist.kernels.permute.order import RowOrder

COUNTS = {
    "uneven": (3, 1, 18, 7),
    "empty experts": (0, 4, 0, 2, 0),
    "all on one": (0, 0, 19),
    "whole blocks": (16, 32),
    "a single expert": (6,),
}


def order_of(counts: tuple[int, ...]) -> RowOrder:
    """Of rows that are sorted already, one assignment each."""
    experts_X1 = torch.repeat_interleave(torch.tensor(counts))[:, None]
    return RowOrder.of(experts_X1, torch.ones_like(experts_X1, dtype=torch.bool), len(counts))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("matmul", "dtype"), [(bmm, torch.float64), (grouped_mm, torch.float32)])
def test_products_are_the_loop(matmul: object, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    rows_RK = torch.randn(sum(counts), 8, dtype=dtype, requires_grad=True)
    weight_eKN = torch.randn(len(counts), 8, 4, dtype=dtype, requires_grad=True)
    order = order_of(counts)
    expected, actual = loop(rows_RK, weight_eKN, order), matmul(rows_RK, weight_eKN, order)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (rows_RK, weight_eKN), grad),
        torch.autograd.grad(expected, (rows_RK, weight_eKN), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("deep", "wide"), [(8, 42), (42, 8), (7, 5), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_rows_of_whole_16_bytes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, deep: int, wide: int, transposed: bool
) -> None:
    """torch's operator takes any width on CPU, on a GPU those alone: widths, and strides, as it checks them there."""
    given: list[Tensor] = []
    plain = F.grouped_mm

    def strict(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        for matrix in (rows, weight):
            longer = max(matrix.stride()[-2:])
            assert matrix.stride(-1) == 1 or matrix.stride(-2) == 1
            assert longer * matrix.element_size() % 16 == 0, f"strides {matrix.stride()} of {matrix.dtype}"
        given.append(rows)
        return plain(rows, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", strict)
    counts = COUNTS["uneven"]
    rows_RN = torch.randn(sum(counts), deep).to(dtype).requires_grad_()
    weight_eNM = torch.randn(len(counts), deep, wide).to(dtype)
    if transposed:  # as [e, M, N], the way that a linear map is kept
        weight_eNM = weight_eNM.mT.contiguous().mT
    weight_eNM.requires_grad_()
    order, tolerance = order_of(counts), 1e-4 if dtype == torch.float32 else 3e-2
    y_RM, expected_RM = grouped_mm(rows_RN, weight_eNM, order), loop(rows_RN, weight_eNM, order)
    assert given and y_RM.shape == expected_RM.shape
    torch.testing.assert_close(y_RM, expected_RM, rtol=tolerance, atol=tolerance)
    grad_RM = torch.randn_like(expected_RM)
    for found, wanted in zip(
        torch.autograd.grad(y_RM, (rows_RN, weight_eNM), grad_RM),
        torch.autograd.grad(expected_RM, (rows_RN, weight_eNM), grad_RM),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=2 * tolerance)
