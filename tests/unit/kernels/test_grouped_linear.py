"""Linear maps of experts against a loop over rows in float64, outputs and all gradients."""

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.grouped_mm.linear import linear
from tests.unit.kernels.test_grouped_mm import COUNTS, order_of

CASES = COUNTS | {"no rows": (0, 0, 0)}
BACKENDS = ["loop", "bmm", "grouped_mm"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("out_first", [True, False])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_after_row(backend: str, counts: tuple[int, ...], out_first: bool) -> None:
    """y[r] = W[i] x[r]; dx[r] = W[i]^T g[r]; dW[i] is the sum of g[r] x[r]^T, zero without rows."""
    rows_RN, weight_eMN, grad_RM = (
        drawn(sum(counts), 5, seed=0),
        drawn(len(counts), 7, 5, seed=1),
        drawn(sum(counts), 7, seed=2),
    )
    expert_R = [i for i, count in enumerate(counts) for _ in range(count)]
    weight = (weight_eMN if out_first else weight_eMN.transpose(1, 2)).contiguous().requires_grad_()
    rows_RN.requires_grad_()
    y_RM = linear(rows_RN, weight, order_of(counts), backend, out_first)
    assert y_RM.shape == grad_RM.shape
    expected_y, expected_x = torch.zeros_like(y_RM), torch.zeros_like(rows_RN)
    expected_w = torch.zeros_like(weight_eMN)
    for r, i in enumerate(expert_R):
        expected_y[r] = weight_eMN[i] @ rows_RN[r].detach()
        expected_x[r] = weight_eMN[i].T @ grad_RM[r]
        expected_w[i] += torch.outer(grad_RM[r], rows_RN[r].detach())
    y_RM.backward(grad_RM)
    torch.testing.assert_close(y_RM, expected_y)
    torch.testing.assert_close(rows_RN.grad, expected_x)
    torch.testing.assert_close(weight.grad, expected_w if out_first else expected_w.transpose(1, 2))
    idle = [i for i, count in enumerate(counts) if count == 0]
    assert weight.grad[idle].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_columns_that_lie_apart(dtype: torch.dtype) -> None:
    """What arrives from a transposed result has strides of its own."""
    rows, weight = drawn(9, 8, seed=0).to(dtype), drawn(2, 8, 4, seed=1).to(dtype).requires_grad_()
    grads = []
    for backend in ("grouped_mm", "loop"):
        y = linear(rows.t().contiguous().t(), weight, order_of((6, 3)), backend, out_first=False)
        grads.append(torch.autograd.grad(y, weight, drawn(4, 9, seed=2).to(dtype).t())[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_triton_is_refused() -> None:
    with pytest.raises(ValueError, match="experts=triton has no linear map of its own: use loop, bmm, grouped_mm"):
        linear(torch.zeros(0, 2), torch.zeros(1, 2, 2), order_of((0,)), "triton", out_first=True)
