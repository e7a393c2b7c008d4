"""Moving rows to their experts and back with weights: gathers in both directions, see reference.py; sums in fp32.

No atomics: the same bits on every run.

Legend: X rows of x (tokens, or rows that arrived from other ranks), K assignments of each, R rows kept, sorted by
expert, D width, B rows of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.launch import check_launch
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.triton_sort import sort_rows

__all__ = ["combine_rows", "gather_rows", "sort_rows"]

_TILE = 4096  # numbers of a tile of rows
_COLUMNS = 512


def gather_rows(x_XD: Tensor, order: RowOrder) -> Tensor:
    """rows[r] = x[slots[r] // K]: [X, D] -> [R, D]."""
    check_launch("gather_rows", _gather, x_XD)
    return _GatherRows.apply(x_XD, order.slots_R, order.rows_XK, order.kept_XK)


def combine_rows(rows_RD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """y[x] = sum over kept k of weights[x, k] * rows[rows_XK[x, k]], summed in fp32: [R, D] -> [X, D].

    weights_XK None: all are 1. Zero where nothing is kept.
    """
    check_launch("combine_rows", _combine, rows_RD)
    return _CombineRows.apply(rows_RD, weights_XK, order.slots_R, order.rows_XK, order.kept_XK)


def permute_tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    return min(_TILE // columns, 64), columns


def _gather_into(x_XD: Tensor, slots_R: Tensor, top_k: int) -> Tensor:
    width = x_XD.shape[1]
    rows_RD = x_XD.new_empty(slots_R.numel(), width)
    block, columns = permute_tile(width)
    if rows_RD.numel():
        grid = (triton.cdiv(slots_R.numel(), block), triton.cdiv(width, columns))
        _gather[grid](x_XD, slots_R, rows_RD, slots_R.numel(), K=top_k, D=width, BLOCK=block, COLUMNS=columns)
    return rows_RD


def _combine_into(rows_RD: Tensor, weights_XK: Tensor | None, rows_XK: Tensor, kept_XK: Tensor) -> Tensor:
    (length, top_k), width = rows_XK.shape, rows_RD.shape[1]
    y_XD = rows_RD.new_empty(length, width)
    block, columns = permute_tile(width)
    if y_XD.numel():
        _combine[(triton.cdiv(length, block), triton.cdiv(width, columns))](
            *(rows_RD, weights_XK, rows_XK, kept_XK, y_XD, length), K=top_k, D=width, BLOCK=block, COLUMNS=columns
        )
    return y_XD


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, slots_R: Tensor, rows_XK: Tensor, kept_XK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_XK, kept_XK)
        return _gather_into(x_XD.contiguous(), slots_R, rows_XK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        rows_XK, kept_XK = ctx.saved_tensors
        return _combine_into(grad_RD.contiguous(), None, rows_XK, kept_XK.contiguous()), None, None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_XK: Tensor | None, slots_R: Tensor, rows_XK: Tensor, kept_XK: Tensor
    ) -> Tensor:
        rows_RD, kept_XK = rows_RD.contiguous(), kept_XK.contiguous()
        weights_XK = None if weights_XK is None else weights_XK.contiguous()
        if weights_XK is None:
            ctx.save_for_backward(slots_R, rows_XK)
        else:
            ctx.save_for_backward(rows_RD, weights_XK, rows_XK, kept_XK)
        return _combine_into(rows_RD, weights_XK, rows_XK, kept_XK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_XD = grad_XD.contiguous()
        saved = ctx.saved_tensors  # read once: under a recomputed block, reading unpacks
        if len(saved) == 2:
            slots_R, rows_XK = saved
            return _gather_into(grad_XD, slots_R, rows_XK.shape[1]), None, None, None, None
        rows_RD, weights_XK, rows_XK, kept_XK = saved
        (length, top_k), width = rows_XK.shape, rows_RD.shape[1]
        grad_rows_RD, grad_weights_XK = torch.empty_like(rows_RD), torch.empty_like(weights_XK)
        block, columns = permute_tile(width)
        if grad_weights_XK.numel():
            _combine_backward[(triton.cdiv(length, block),)](
                *(rows_RD, weights_XK, rows_XK, kept_XK, grad_XD, grad_rows_RD, grad_weights_XK, length),
                **dict(K=top_k, K_PAD=triton.next_power_of_2(top_k), D=width, BLOCK=block, COLUMNS=columns),
            )
        return grad_rows_RD, grad_weights_XK, None, None, None


@triton.jit
def _gather(
    x_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    length: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column_D = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source_B = tl.load(slots_ptr + row_B, mask=row_B < length, other=0) // K
    mask_BD = (row_B < length)[:, None] & (column_D < D)[None, :]
    x_BD = tl.load(x_ptr + source_B[:, None] * D + column_D[None, :], mask=mask_BD)
    tl.store(rows_ptr + row_B[:, None] * D + column_D[None, :], x_BD, mask=mask_BD)


@triton.jit
def _combine(
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    places_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    y_ptr: tl.tensor,
    length: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    x_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column_D = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y_BD = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in range(K):
        kept_B = tl.load(kept_ptr + x_B * K + k, mask=x_B < length, other=False)
        row_B = tl.load(places_ptr + x_B * K + k, mask=kept_B, other=0)
        mask_BD = kept_B[:, None] & (column_D < D)[None, :]
        rows_BD = tl.load(rows_ptr + row_B[:, None] * D + column_D[None, :], mask=mask_BD, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            rows_BD *= tl.load(weights_ptr + x_B * K + k, mask=kept_B, other=0.0).to(tl.float32)[:, None]
        y_BD += rows_BD
    at_BD = x_B[:, None] * D + column_D[None, :]
    tl.store(y_ptr + at_BD, y_BD, mask=(x_B < length)[:, None] & (column_D < D)[None, :])


@triton.jit
def _combine_backward(
    rows_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    places_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_rows_ptr: tl.tensor,
    grad_weights_ptr: tl.tensor,
    length: tl.tensor,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Each x reads its gradient once and serves its K rows: d rows = weight * dy, d weight = <row, dy>.

    Every row belongs to exactly one kept assignment, so each is written once.
    """
    x_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place_K = tl.arange(0, K_PAD)
    dots_BK = tl.zeros([BLOCK, K_PAD], tl.float32)
    for start in range(0, D, COLUMNS):
        column_D = start + tl.arange(0, COLUMNS)
        mask_BD = (x_B < length)[:, None] & (column_D < D)[None, :]
        grad_BD = tl.load(grad_ptr + x_B[:, None] * D + column_D[None, :], mask=mask_BD, other=0.0).to(tl.float32)
        for k in range(K):
            kept_B = tl.load(kept_ptr + x_B * K + k, mask=x_B < length, other=False)
            row_B = tl.load(places_ptr + x_B * K + k, mask=kept_B, other=0)
            weight_B = tl.load(weights_ptr + x_B * K + k, mask=kept_B, other=0.0).to(tl.float32)
            at_BD = row_B[:, None] * D + column_D[None, :]
            mask_BD = kept_B[:, None] & (column_D < D)[None, :]
            rows_BD = tl.load(rows_ptr + at_BD, mask=mask_BD, other=0.0).to(tl.float32)
            dot_B = tl.sum(rows_BD * grad_BD, 1)
            dots_BK += tl.where(place_K[None, :] == k, dot_B[:, None], 0.0)
            tl.store(grad_rows_ptr + at_BD, grad_BD * weight_B[:, None], mask=mask_BD)
    at_BK = x_B[:, None] * K + place_K[None, :]
    tl.store(grad_weights_ptr + at_BK, dots_BK, mask=(x_B < length)[:, None] & (place_K < K)[None, :])
