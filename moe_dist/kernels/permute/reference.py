"""Moving rows to where their experts want them, and back with weights: gathers in both directions.

No scatter, no atomics: the same sum in the same order on every run.

Legend: X rows of x, K assignments of each, R rows sorted by expert, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.permute.order import RowOrder


def gather_rows(x_XD: Tensor, order: RowOrder) -> Tensor:
    """rows[r] = x[source[r]]: [X, D] -> [R, D]."""
    return _GatherRows.apply(x_XD, order)


def combine_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * rows[rows_XK[x, k]]: [R, D] -> [X, D]; zero where nothing is kept.

    weights_XK None counts every kept row once.
    """
    if weights_XK is None:
        return _SumRows.apply(rows_RD, order)
    return _CombineRows.apply(rows_RD, weights_XK, order)


def sum_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """`combine_rows` without autograd; rows past those of `order` are not read. Low precision is summed in fp32."""
    kept = order.slots_R.numel()
    if kept == 0:
        return rows_RD.new_zeros(order.kept_XK.shape[0], rows_RD.shape[1])
    if kept < order.kept_XK.numel() or order.fullest is not None:
        weights_XK = order.kept_XK if weights_XK is None else weights_XK * order.kept_XK
    if rows_RD.device.type == "cpu" and order.fullest is None:
        scale_XK = None if weights_XK is None else weights_XK.to(rows_RD.dtype)
        return F.embedding_bag(order.rows_XK, rows_RD, mode="sum", per_sample_weights=scale_XK)  # one fused pass
    gathered_XKD = rows_RD.index_select(0, order.rows_XK.flatten()).view(*order.rows_XK.shape, -1)
    if order.fullest is not None:  # a row that belongs to nobody can hold NaN, and 0 * NaN is not 0
        gathered_XKD = gathered_XKD.masked_fill(~order.kept_XK[:, :, None], 0)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    weights_XK = torch.ones_like(order.kept_XK) if weights_XK is None else weights_XK
    return torch.einsum("xkd,xk->xd", gathered_XKD.to(wide), weights_XK.to(wide)).to(rows_RD.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_XD.index_select(0, order.source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad_RD.contiguous(), None, ctx.order), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return sum_rows(rows_RD, None, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None]:
        return grad_XD.index_select(0, ctx.order.source_R), None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_XK: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_XK)
        ctx.order = order
        return sum_rows(rows_RD, weights_XK, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weights_XK = ctx.saved_tensors
        order: RowOrder = ctx.order
        if rows_RD.shape[0] == 0:
            return torch.zeros_like(rows_RD), torch.zeros_like(weights_XK), None
        grad_rows_RD = grad_XD.index_select(0, order.source_R)
        # d/dw[x, k] = <row, grad of its x>; made per row, then read by assignment.
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        dots_R = torch.linalg.vecdot(rows_RD, grad_rows_RD).to(wide)
        grad_weights_XK = torch.where(order.kept_XK, dots_R[order.rows_XK], 0)
        weight_R = weights_XK.flatten()[order.slots_R]
        grad_rows_RD *= weight_R[:, None].to(grad_rows_RD.dtype)
        return grad_rows_RD, grad_weights_XK.to(weights_XK.dtype), None
