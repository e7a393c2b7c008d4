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
    return _GatherRows.apply(x_XD, *_tensors(order))


def combine_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * rows[rows_XK[x, k]]: [R, D] -> [X, D]; zero where nothing is kept.

    weights_XK None counts every kept row once.
    """
    if weights_XK is None:
        return _SumRows.apply(rows_RD, *_tensors(order))
    return _CombineRows.apply(rows_RD, weights_XK, *_tensors(order))


def sum_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """`combine_rows` without autograd; rows past those of `order` are not read. Low precision is summed in fp32."""
    _, slots_R, rows_XK, kept_XK, exact = _tensors(order)
    return _sum(rows_RD, weights_XK, slots_R, rows_XK, kept_XK, exact)


def _tensors(order: RowOrder) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(source_R, slots_R, rows_XK, kept_XK, whether each row is somebody's): what autograd's functions are given one by
    one, as torch.compile wants it."""
    return order.source_R, order.slots_R, order.rows_XK, order.kept_XK, order.fullest is None


def _sum(
    rows_RD: Tensor, weights_XK: Tensor | None, slots_R: Tensor, rows_XK: Tensor, kept_XK: Tensor, exact: bool
) -> Tensor:
    kept = slots_R.numel()
    if kept == 0:
        return rows_RD.new_zeros(kept_XK.shape[0], rows_RD.shape[1])
    if kept < kept_XK.numel() or not exact:
        weights_XK = kept_XK if weights_XK is None else weights_XK * kept_XK
    if rows_RD.device.type == "cpu" and exact:
        scale_XK = None if weights_XK is None else weights_XK.to(rows_RD.dtype)
        return F.embedding_bag(rows_XK, rows_RD, mode="sum", per_sample_weights=scale_XK)  # one fused pass
    gathered_XKD = rows_RD.index_select(0, rows_XK.flatten()).view(*rows_XK.shape, -1)
    if not exact:  # a row that belongs to nobody can hold NaN, and 0 * NaN is not 0
        gathered_XKD = gathered_XKD.masked_fill(~kept_XK[:, :, None], 0)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    weights_XK = torch.ones_like(kept_XK) if weights_XK is None else weights_XK
    return torch.einsum("xkd,xk->xd", gathered_XKD.to(wide), weights_XK.to(wide)).to(rows_RD.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_XD: Tensor, source_R: Tensor, slots_R: Tensor, rows_XK: Tensor, kept_XK: Tensor, exact: bool
    ) -> Tensor:
        ctx.save_for_backward(slots_R, rows_XK, kept_XK)
        ctx.exact = exact
        return x_XD.index_select(0, source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        slots_R, rows_XK, kept_XK = ctx.saved_tensors
        grad_XD = _sum(grad_RD.contiguous(), None, slots_R, rows_XK, kept_XK, ctx.exact)
        return grad_XD, None, None, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, source_R: Tensor, slots_R: Tensor, rows_XK: Tensor, kept_XK: Tensor, exact: bool
    ) -> Tensor:
        ctx.save_for_backward(source_R)
        return _sum(rows_RD, None, slots_R, rows_XK, kept_XK, exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (source_R,) = ctx.saved_tensors
        return grad_XD.index_select(0, source_R), None, None, None, None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_XK: Tensor,
        source_R: Tensor,
        slots_R: Tensor,
        rows_XK: Tensor,
        kept_XK: Tensor,
        exact: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_XK, source_R, slots_R, rows_XK, kept_XK)
        return _sum(rows_RD, weights_XK, slots_R, rows_XK, kept_XK, exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        rows_RD, weights_XK, source_R, slots_R, rows_XK, kept_XK = ctx.saved_tensors
        if rows_RD.shape[0] == 0:
            return torch.zeros_like(rows_RD), torch.zeros_like(weights_XK), None, None, None, None, None
        grad_rows_RD = grad_XD.index_select(0, source_R)
        # d/dw[x, k] = <row, grad of its x>; made per row, then read by assignment.
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        dots_R = torch.linalg.vecdot(rows_RD, grad_rows_RD).to(wide)
        grad_weights_XK = torch.where(kept_XK, dots_R[rows_XK], 0)
        weight_R = weights_XK.flatten()[slots_R]
        grad_rows_RD *= weight_R[:, None].to(grad_rows_RD.dtype)
        return grad_rows_RD, grad_weights_XK.to(weights_XK.dtype), None, None, None, None, None
