"""A linear map for each expert: every row times the matrix of its own expert.

| backend    | what runs                                                                       |
|------------|---------------------------------------------------------------------------------|
| loop       | expert after expert, by autograd: the oracle                                    |
| bmm        | every expert padded to the fullest, one batched product                         |
| grouped_mm | torch's grouped GEMM; on CPU a loop of ours that writes each result where it belongs |

Experts without rows get zero gradients, never none.

Legend: R rows sorted by expert, N inputs, M outputs, e experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.grouped_mm.cpu import replaces
from moe_dist.kernels.grouped_mm.onednn import rows_computed
from moe_dist.kernels.grouped_mm.reference import GROUPED_MM
from moe_dist.kernels.permute.order import RowOrder


def linear(rows_RN: Tensor, weight: Tensor, order: RowOrder, backend: str, out_first: bool) -> Tensor:
    """y[r] = W[i] rows[r], i the expert of row r: [R, N] -> [R, M].

    out_first: weight is [e, M, N], as torch keeps linear maps; otherwise [e, N, M]. Raises ValueError for a backend
    that has no linear map.
    """
    if backend not in GROUPED_MM:
        raise ValueError(f"experts={backend} has no linear map of its own: use {', '.join(GROUPED_MM)}")
    rows = order.slots_R.numel()
    assert rows_RN.shape[0] == rows, f"{rows_RN.shape[0]} rows, but the experts have {rows}"
    if replaces(backend, rows_RN.device.type) and order.fullest is None:
        return _Linear.apply(rows_RN.contiguous(), weight, order.rows_per_expert, out_first)
    weight_eNM = weight.transpose(1, 2) if out_first else weight
    if rows == 0:
        return rows_RN @ weight_eNM[0]  # no rows, but in the graph: idle experts get zero gradients
    return GROUPED_MM[backend](rows_RN, weight_eNM, order)


class _Linear(torch.autograd.Function):
    """The loop on CPU: neither results nor gradients are put together from parts afterwards."""

    @staticmethod
    def forward(ctx: Any, rows_RN: Tensor, weight: Tensor, counts: tuple[int, ...], out_first: bool) -> Tensor:
        ctx.save_for_backward(rows_RN, weight)
        ctx.counts, ctx.out_first = counts, out_first
        out_RM = rows_RN.new_empty(rows_RN.shape[0], weight.shape[1 if out_first else 2])
        for rows, w, out in zip(rows_RN.split(counts), weight.unbind(0), out_RM.split(counts), strict=True):
            whole = rows_computed(len(rows), rows.dtype)
            if whole == len(rows):
                torch.mm(rows, w.t() if out_first else w, out=out)
            else:  # zero rows: then a row's result does not depend on how many others there are
                padded = F.pad(rows, (0, 0, 0, whole - len(rows)))
                out.copy_(torch.mm(padded, w.t() if out_first else w)[: len(rows)])
        return out_RM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RM: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (rows_RN, weight), counts = ctx.saved_tensors, ctx.counts
        grad_RM = grad_RM.contiguous()
        grad_rows_RN = torch.empty_like(rows_RN) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_rows_RN is not None:
            parts = zip(grad_RM.split(counts), weight.unbind(0), grad_rows_RN.split(counts), strict=True)
            for grad, w, out in parts:
                torch.mm(grad, w if ctx.out_first else w.t(), out=out)
        if grad_weight is not None:
            left, right = (grad_RM, rows_RN) if ctx.out_first else (rows_RN, grad_RM)
            for a, b, out in zip(left.split(counts), right.split(counts), grad_weight.unbind(0), strict=True):
                torch.mm(a.t(), b, out=out)  # zeros where there are no rows
        return grad_rows_RN, grad_weight, None, None
