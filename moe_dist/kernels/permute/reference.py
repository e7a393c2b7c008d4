"""Moving rows to where their experts want them, and back with weights: gathers in both directions.

A permutation is held twice, once from each side, so that forward and backward are both gathers: no scatter, no atomics,
the same sum in the same order on every run.

Legend: T tokens, K top_k, R rows, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(x_TD: Tensor, source_R: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """rows[r] = x[source[r]]: [T, D] -> [R, D].

    source_R: the token of each row; rows_TK: the row of each assignment (any valid index where kept_TK is False).
    """
    return _GatherRows.apply(x_TD, source_R, rows_TK, kept_TK)


def combine_rows(rows_RD: Tensor, weights_TK: Tensor, source_R: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """y[t] = sum over kept k of weights[t, k] * rows[rows_TK[t, k]]: [R, D] -> [T, D]; zero where nothing is kept."""
    return _CombineRows.apply(rows_RD, weights_TK, source_R, rows_TK, kept_TK)


def _sum_rows(rows_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """sum_k weights[t, k] * rows[rows_TK[t, k]]; entries of weight zero may point anywhere."""
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(rows_TK.shape[0], rows_RD.shape[1])
    if rows_RD.device.type == "cpu":
        # One fused pass; accumulates bfloat16 rows in fp32.
        return F.embedding_bag(rows_TK, rows_RD, mode="sum", per_sample_weights=weights_TK.to(rows_RD.dtype))
    gathered_TKD = rows_RD.index_select(0, rows_TK.flatten()).view(*rows_TK.shape, -1)
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    return torch.einsum("tkd,tk->td", gathered_TKD.to(wide), weights_TK.to(wide)).to(rows_RD.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_R: Tensor, rows_TK: Tensor, kept_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK, kept_TK)
        return x_TD.index_select(0, source_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        rows_TK, kept_TK = ctx.saved_tensors
        return _sum_rows(grad_RD.contiguous(), rows_TK, kept_TK.to(grad_RD.dtype)), None, None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weights_TK: Tensor, source_R: Tensor, rows_TK: Tensor, kept_TK: Tensor
    ) -> Tensor:
        weights_TK = weights_TK * kept_TK
        ctx.save_for_backward(rows_RD, weights_TK, source_R, rows_TK, kept_TK)
        return _sum_rows(rows_RD, rows_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_RD, weights_TK, source_R, rows_TK, kept_TK = ctx.saved_tensors
        if rows_RD.shape[0] == 0:
            return torch.zeros_like(rows_RD), torch.zeros_like(weights_TK), None, None, None
        grad_rows_RD = grad_TD.index_select(0, source_R)
        # d/dw[t, k] = <row, grad of its token>; made per row, then read by assignment.
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        dots_R = torch.linalg.vecdot(rows_RD, grad_rows_RD).to(wide)
        grad_weights_TK = dots_R[rows_TK] * kept_TK
        # The row's own weight, found by writing each kept assignment's weight to its row: rows are unique, no sum.
        weight_R = weights_TK.new_zeros(rows_RD.shape[0])
        weight_R[rows_TK[kept_TK]] = weights_TK[kept_TK]
        grad_rows_RD *= weight_R[:, None].to(grad_rows_RD.dtype)
        return grad_rows_RD, grad_weights_TK.to(weights_TK.dtype), None, None, None
