"""The backward kernels: gradient of the hidden units with the activation's in the epilogue, weights, column sums.

The gradient of x is the down-projection of `triton_forward` with other arguments. Nothing is added atomically: each
number is summed by one program, in one order, and experts without rows are written as zeros by theirs.

Legend: X rows of x, K assignments of each, R rows sorted by expert, e experts, D d_model, F expert hidden, T tiles; in
kernels M rows and N columns of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling
from moe_dist.kernels.grouped_mm.triton_parts import (
    GROUP,
    add_products,
    factor_of,
    halves,
    place,
    through_factor,
    value_and_slope,
)
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.tile import add_product, rounded

_SUM_ROWS, _SUM_COLUMNS = 32, 128  # blocks of the kernels for biases


@triton.jit
def through_activation(
    acc_MN, weight_M1, column, rows, columns, shift, pre_gate_ptr, pre_up_ptr, act_ptr,
    grad_gate_ptr, grad_up_ptr, weighted_ptr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Store what `hidden_gradient` gives for these columns of acc = dA, and return acc . act of each row."""
    col_N = column + tl.arange(0, acc_MN.shape[1])
    row_M = tl.arange(0, acc_MN.shape[0])
    at_MN = row_M[:, None] * columns + col_N[None, :]
    mask_MN = (row_M < rows)[:, None] & (col_N < columns)[None, :]
    kind = grad_up_ptr.dtype.element_ty
    pre_up_MN = tl.load(pre_up_ptr + shift + at_MN, mask=mask_MN, other=0.0).to(tl.float32)
    if GATED:
        pre_gate_MN = tl.load(pre_gate_ptr + shift + at_MN, mask=mask_MN, other=0.0).to(tl.float32)
        value_MN, slope_MN = value_and_slope(pre_gate_MN, FUNCTION)
        factor_MN = factor_of(pre_up_MN, FUNCTION)
        act_MN = value_MN * factor_MN
    else:
        act_MN, slope_MN = value_and_slope(pre_up_MN, FUNCTION)
    if act_ptr is not None:
        act_MN = tl.load(act_ptr + shift + at_MN, mask=mask_MN, other=0.0).to(tl.float32)
    else:
        act_MN = rounded(act_MN, kind).to(tl.float32)  # rounded as forward did
    dots_M = tl.sum(tl.where(mask_MN, acc_MN * act_MN, 0.0), axis=1)
    if weight_M1 is not None:
        acc_MN *= weight_M1
        act_MN *= weight_M1
    if weighted_ptr is not None:
        tl.store(weighted_ptr + shift + at_MN, rounded(act_MN, kind), mask=mask_MN)
    if GATED:
        grad_up_MN = through_factor(acc_MN * value_MN, pre_up_MN, FUNCTION)
        tl.store(grad_up_ptr + shift + at_MN, rounded(grad_up_MN, kind), mask=mask_MN)  # first: else clamped spills
        tl.store(grad_gate_ptr + shift + at_MN, rounded(acc_MN * factor_MN * slope_MN, kind), mask=mask_MN)
    else:
        tl.store(grad_up_ptr + shift + at_MN, rounded(acc_MN * slope_MN, kind), mask=mask_MN)
    return dots_M


@triton.jit
def hidden_gradient(
    gy_ptr, source_ptr, tiles_ptr, out_ptr, pre_gate_ptr, pre_up_ptr, act_ptr, weights_ptr, slots_ptr,
    grad_gate_ptr, grad_up_ptr, weighted_ptr, dots_ptr,
    num_tiles, num_rows, columns, depth, N_BLOCKS, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From dA = gy[source] out_i^T: gradients of the pre-activations, weight * act, and this block's part of dA . act.

    act None: computed again. weighted None: not wanted. dots: [blocks of F, R], summed over blocks afterwards.
    """
    tile, block = place(num_tiles, N_BLOCKS, GROUP)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first >= end:
        return
    row_M = first + tl.arange(0, M)
    inside_M = tl.minimum(row_M, end - 1)
    acc_MN = tl.zeros((M, N), tl.float32)
    acc_MN, _ = add_products(
        acc_MN, acc_MN, gy_ptr, tl.load(source_ptr + inside_M), out_ptr + expert * columns * depth, None,
        tl.minimum(block * N + tl.arange(0, N), columns - 1).to(tl.int64), depth, 1, columns, depth,
        True, K, EVEN, PRECISION,
    )  # fmt: skip
    weight_M1 = None
    if weights_ptr is not None:
        weight_M1 = tl.load(weights_ptr + tl.load(slots_ptr + inside_M))[:, None].to(tl.float32)
    shift = first * columns  # the one 64-bit product: what is added to it stays inside a tile
    if HALVES:
        acc_MN, acc2_MN = halves(acc_MN)
    dots_M = through_activation(
        acc_MN, weight_M1, block * N, end - first, columns, shift, pre_gate_ptr, pre_up_ptr, act_ptr,
        grad_gate_ptr, grad_up_ptr, weighted_ptr, FUNCTION, GATED,
    )  # fmt: skip
    if HALVES:
        dots_M += through_activation(
            acc2_MN, weight_M1, block * N + N // 2, end - first, columns, shift, pre_gate_ptr, pre_up_ptr, act_ptr,
            grad_gate_ptr, grad_up_ptr, weighted_ptr, FUNCTION, GATED,
        )  # fmt: skip
    if dots_ptr is not None:
        tl.store(dots_ptr + block.to(tl.int64) * num_rows + row_M, dots_M, mask=row_M < end)


@triton.jit
def weight_gradient(
    a_ptr, a2_ptr, b_ptr, source_ptr, counts_ptr, ends_ptr, out_ptr, out2_ptr, height, columns,
    M_BLOCKS, N_BLOCKS, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, INSIDE: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i = a^T b[source] over the rows of expert i, and out2_i = a2^T b[source] unless a2 is None: b loaded once.

    INSIDE: blocks of columns end with the columns. Then whole steps of K rows need no mask; what is left of an expert's
    rows takes one step more.
    """
    per_expert = M_BLOCKS * N_BLOCKS
    expert = (tl.program_id(0) // per_expert).to(tl.int64)
    inside = tl.program_id(0) % per_expert
    first = inside // (GROUP * N_BLOCKS) * GROUP
    size = tl.minimum(M_BLOCKS - first, GROUP)
    inside = inside % (GROUP * N_BLOCKS)
    col_M = (first + inside % size) * M + tl.arange(0, M)
    col_N = inside // size * N + tl.arange(0, N)
    end, count = tl.load(ends_ptr + expert), tl.load(counts_ptr + expert)
    acc_MN = tl.zeros((M, N), tl.float32)
    acc2_MN = tl.zeros((M, N), tl.float32)
    rest = end - count % K if INSIDE else end - count  # the first row that is not in a whole step
    for row in range(end - count, rest, K):
        row_K = (row + tl.arange(0, K)).to(tl.int64)  # the interpreter's loops count in int32
        source_K = tl.load(source_ptr + row_K)
        b_KN = tl.load(b_ptr + source_K[:, None] * columns + col_N[None, :])
        a_KM = row_K[:, None] * height + col_M[None, :]
        acc_MN = add_product(acc_MN, tl.trans(tl.load(a_ptr + a_KM)), b_KN, PRECISION)
        if a2_ptr is not None:
            acc2_MN = add_product(acc2_MN, tl.trans(tl.load(a2_ptr + a_KM)), b_KN, PRECISION)
    for row in range(rest, end, K):
        row_K = (row + tl.arange(0, K)).to(tl.int64)
        inside_K = row_K < end
        source_K = tl.load(source_ptr + row_K, mask=inside_K, other=0)
        # Rows past the end are another expert's: zeros on both sides, because 0 * inf is not 0.
        mask_KN = inside_K[:, None] & (col_N < columns)[None, :]
        b_KN = tl.load(b_ptr + source_K[:, None] * columns + col_N[None, :], mask=mask_KN, other=0.0)
        a_KM = row_K[:, None] * height + col_M[None, :]
        mask_KM = inside_K[:, None] & (col_M < height)[None, :]
        left_MK = tl.trans(tl.load(a_ptr + a_KM, mask=mask_KM, other=0.0))
        acc_MN = add_product(acc_MN, left_MK, b_KN, PRECISION)
        if a2_ptr is not None:
            left2_MK = tl.trans(tl.load(a2_ptr + a_KM, mask=mask_KM, other=0.0))
            acc2_MN = add_product(acc2_MN, left2_MK, b_KN, PRECISION)
    out_MN = (expert * height + col_M[:, None]) * columns + col_N[None, :]
    mask_MN = (col_M < height)[:, None] & (col_N < columns)[None, :]
    tl.store(out_ptr + out_MN, rounded(acc_MN, out_ptr.dtype.element_ty), mask=mask_MN)
    if a2_ptr is not None:
        tl.store(out2_ptr + out_MN, rounded(acc2_MN, out2_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def column_sums(
    a_ptr, source_ptr, weights_ptr, slots_ptr, counts_ptr, ends_ptr, out_ptr, columns,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out_i = sum over the rows r of expert i of weight_r * a[source_r]; source None: a is sorted; weights None: 1."""
    expert = tl.program_id(0).to(tl.int64)
    col_N = tl.program_id(1) * N + tl.arange(0, N)
    end = tl.load(ends_ptr + expert)
    acc_MN = tl.zeros((M, N), tl.float32)
    for row in range(end - tl.load(counts_ptr + expert), end, M):
        row_M = (row + tl.arange(0, M)).to(tl.int64)
        inside_M = row_M < end
        source_M = row_M
        if source_ptr is not None:
            source_M = tl.load(source_ptr + row_M, mask=inside_M, other=0)
        mask_MN = inside_M[:, None] & (col_N < columns)[None, :]
        a_MN = tl.load(a_ptr + source_M[:, None] * columns + col_N[None, :], mask=mask_MN, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            slot_M = tl.load(slots_ptr + row_M, mask=inside_M, other=0)
            a_MN *= tl.load(weights_ptr + slot_M, mask=inside_M, other=0.0)[:, None].to(tl.float32)
        acc_MN += a_MN
    sums_N = rounded(tl.sum(acc_MN, axis=0), out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert * columns + col_N, sums_N, mask=col_N < columns)


@triton.jit
def bias_dots(gy_ptr, source_ptr, bias_ptr, tiles_ptr, dots_ptr, num_tiles, columns, M: tl.constexpr, N: tl.constexpr):
    """dots[r] = gy[source_r] . bias of the row's expert."""
    tile = tl.program_id(0)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first >= end:
        return
    row_M = first + tl.arange(0, M)
    source_M = tl.load(source_ptr + tl.minimum(row_M, end - 1))
    acc_MN = tl.zeros((M, N), tl.float32)
    for column in range(0, columns, N):
        col_N = column + tl.arange(0, N)
        mask_1N = (col_N < columns)[None, :]
        bias_N = tl.load(bias_ptr + expert * columns + col_N, mask=col_N < columns, other=0.0).to(tl.float32)
        gy_MN = tl.load(gy_ptr + source_M[:, None] * columns + col_N[None, :], mask=mask_1N, other=0.0)
        acc_MN += gy_MN.to(tl.float32) * bias_N[None, :]
    tl.store(dots_ptr + row_M, tl.sum(acc_MN, axis=1), mask=row_M < end)


class HiddenGrad(NamedTuple):
    """Gradients of the pre-activations, [R, F]; weight * act, [R, F]; out_row . gy before weights, [R] fp32."""

    gate: Tensor | None
    up: Tensor
    weighted: Tensor | None
    dots: Tensor | None


def run_hidden(
    gy_XD: Tensor,
    order: RowOrder,
    tiles_3T: Tensor,
    w: ExpertWeights,
    weights_XK: Tensor | None,
    saved: tuple[Tensor | None, Tensor, Tensor | None],
    function: str,
    tiling: ExpertTiling,
    wanted: tuple[bool, bool],
) -> HiddenGrad:
    """saved: pre_gate, pre_up and act or None. wanted: whether `weighted` and `dots` are."""
    (pre_gate, pre_up, act), (d_ff, d_model) = saved, w.up.shape[1:]
    num_rows, tiles, block = order.slots_R.numel(), tiles_3T.shape[1], tiling.hidden_grad
    blocks = triton.cdiv(d_ff, block.n)
    grad_up = torch.empty(pre_up.shape, dtype=pre_up.dtype, device=pre_up.device)
    grad_gate = None if pre_gate is None else torch.empty(pre_up.shape, dtype=pre_up.dtype, device=pre_up.device)
    same = weights_XK is None and act is not None  # then weight * act is what was kept
    weighted = None
    if wanted[0] and not same:
        weighted = torch.empty(pre_up.shape, dtype=pre_up.dtype, device=pre_up.device)
    parts = blocks + (w.out_bias is not None)
    dots = torch.empty(parts, num_rows, dtype=torch.float32, device=gy_XD.device) if wanted[1] else None
    if num_rows:
        hidden_gradient[(tiles * blocks,)](
            gy_XD, order.source_R, tiles_3T, w.out, pre_gate, pre_up, act, weights_XK, order.slots_R,
            grad_gate, grad_up, weighted, dots, tiles, num_rows, d_ff, d_model, blocks, function, pre_gate is not None,
            tiling.rows, block.n, block.k, d_model % block.k == 0, block.halves, GROUP, tiling.precision,
            num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
        if dots is not None and w.out_bias is not None:
            bias_dots[(tiles,)](
                gy_XD, order.source_R, w.out_bias, tiles_3T, dots[-1], tiles, d_model,
                tiling.rows, min(_SUM_COLUMNS, block.k),
            )  # fmt: skip
    dots_R = None if dots is None else dots.sum(0)
    return HiddenGrad(grad_gate, grad_up, act if same and wanted[0] else weighted, dots_R)


def run_weights(
    lefts: list[Tensor | None], right_XD: Tensor, order: RowOrder, ends_e: Tensor, tiling: ExpertTiling, w_eFD: Tensor
) -> list[Tensor | None]:
    """left^T right[source] of each expert, [e, F, D], for one or two lefts [R, F]."""
    assert all(left is not None for left in lefts)
    experts, d_ff, d_model = w_eFD.shape
    two = len(lefts) == 2
    block = tiling.up_grad if two else tiling.out_grad
    rows, columns = triton.cdiv(d_ff, tiling.grad_rows), triton.cdiv(d_model, block.n)
    inside = d_ff % tiling.grad_rows == 0 and d_model % block.n == 0
    grads: list[Tensor | None] = [torch.empty(w_eFD.shape, dtype=w_eFD.dtype, device=w_eFD.device) for _ in lefts]
    weight_gradient[(experts * rows * columns,)](
        lefts[0], lefts[1] if two else None, right_XD, order.source_R, order.counts_e, ends_e,
        grads[0], grads[1] if two else None, d_ff, d_model, rows, columns,
        tiling.grad_rows, block.n, block.k, inside, GROUP, tiling.precision,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return grads


def run_bias(
    a: Tensor | None,
    order: RowOrder,
    ends_e: Tensor,
    bias_eN: Tensor | None,
    gathered: bool = False,
    weights_XK: Tensor | None = None,
) -> Tensor:
    """Sum of each expert's rows of `a`: sorted ones, or with `gathered` the rows of x they come from, weighted."""
    assert a is not None and bias_eN is not None
    experts, columns = bias_eN.shape
    sums = torch.empty(bias_eN.shape, dtype=bias_eN.dtype, device=bias_eN.device)
    width = min(_SUM_COLUMNS, triton.next_power_of_2(columns))
    column_sums[(experts, triton.cdiv(columns, width))](
        a, order.source_R if gathered else None, weights_XK, order.slots_R, order.counts_e, ends_e, sums, columns,
        _SUM_ROWS, width,
    )  # fmt: skip
    return sums
