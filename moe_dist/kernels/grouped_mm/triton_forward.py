"""The forward kernels: up-projection with gather and activation, down-projection with weights, sum over K.

Legend: X rows of x, K assignments of each, R rows sorted by expert, e experts, D d_model, F expert hidden, T tiles; in
kernels M rows and N columns of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling
from moe_dist.kernels.grouped_mm.triton_parts import GROUP, add_products, factor_of, halves, place, value_and_slope
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.tile import rounded


@triton.jit
def activate(
    up_MN, gate_MN, expert, column, rows, columns, shift, gate_bias_ptr, up_bias_ptr, pre_gate_ptr, pre_up_ptr, act_ptr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Biases, activation, and all that is stored of these columns."""
    col_N = column + tl.arange(0, up_MN.shape[1])
    row_M = tl.arange(0, up_MN.shape[0])
    inside_N = col_N < columns
    at_MN = row_M[:, None] * columns + col_N[None, :]
    mask_MN = (row_M < rows)[:, None] & inside_N[None, :]
    kind = act_ptr.dtype.element_ty
    if up_bias_ptr is not None:
        bias_N = tl.load(up_bias_ptr + expert * columns + col_N, mask=inside_N, other=0.0)
        up_MN += bias_N[None, :].to(tl.float32)
    # Rounded first: the backward pass computes the same activation again from what is stored.
    pre_up_MN = rounded(up_MN, kind)
    tl.store(pre_up_ptr + shift + at_MN, pre_up_MN, mask=mask_MN)
    if GATED:
        if gate_bias_ptr is not None:
            bias_N = tl.load(gate_bias_ptr + expert * columns + col_N, mask=inside_N, other=0.0)
            gate_MN += bias_N[None, :].to(tl.float32)
        pre_gate_MN = rounded(gate_MN, kind)
        tl.store(pre_gate_ptr + shift + at_MN, pre_gate_MN, mask=mask_MN)
        value_MN, _ = value_and_slope(pre_gate_MN.to(tl.float32), FUNCTION)
        act_MN = value_MN * factor_of(pre_up_MN.to(tl.float32), FUNCTION)
    else:
        act_MN, _ = value_and_slope(pre_up_MN.to(tl.float32), FUNCTION)
    tl.store(act_ptr + shift + at_MN, rounded(act_MN, kind), mask=mask_MN)


@triton.jit
def up_projection(
    x_ptr, source_ptr, tiles_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, pre_gate_ptr, pre_up_ptr, act_ptr,
    num_tiles, columns, depth, N_BLOCKS, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """pre = x[source] W_i^T + bias of gate and up, x loaded once; act = f(pre_gate) * pre_up or f(pre_up)."""
    tile, block = place(num_tiles, N_BLOCKS, GROUP)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first >= end:
        return
    # Rows and columns past the end repeat the last one, so that the main loop needs no mask for them.
    source_M = tl.load(source_ptr + tl.minimum(first + tl.arange(0, M), end - 1))
    inside_N = tl.minimum(block * N + tl.arange(0, N), columns - 1).to(tl.int64)
    shift = expert * columns * depth
    acc_up_MN = tl.zeros((M, N), tl.float32)
    acc_gate_MN = tl.zeros((M, N), tl.float32)
    acc_up_MN, acc_gate_MN = add_products(
        acc_up_MN, acc_gate_MN, x_ptr, source_M, up_ptr + shift, gate_ptr + shift if GATED else None, inside_N,
        depth, 1, columns, depth, True, K, EVEN, PRECISION,
    )  # fmt: skip
    shift = first * columns  # the one 64-bit product: what is added to it stays inside a tile
    if HALVES:
        acc_up_MN, acc_up2_MN = halves(acc_up_MN)
        acc_gate_MN, acc_gate2_MN = halves(acc_gate_MN)
        activate(
            acc_up2_MN, acc_gate2_MN, expert, block * N + N // 2, end - first, columns, shift,
            gate_bias_ptr, up_bias_ptr, pre_gate_ptr, pre_up_ptr, act_ptr, FUNCTION, GATED,
        )  # fmt: skip
    activate(
        acc_up_MN, acc_gate_MN, expert, block * N, end - first, columns, shift,
        gate_bias_ptr, up_bias_ptr, pre_gate_ptr, pre_up_ptr, act_ptr, FUNCTION, GATED,
    )  # fmt: skip


@triton.jit
def down_projection(
    a_ptr, a2_ptr, b_ptr, b2_ptr, bias_ptr, weights_ptr, slots_ptr, target_ptr, tiles_ptr, out_ptr,
    num_tiles, columns, depth, N_BLOCKS,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, INSIDE: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = weight * (a B_i + a2 B2_i + bias_i); a2, bias, weights may be None. Rows go to `target`, None: stay sorted.

    It is the second product of forward, and of backward the gradient of x.
    """
    tile, block = place(num_tiles, N_BLOCKS, GROUP)
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + num_tiles + tile)
    end = tl.load(tiles_ptr + 2 * num_tiles + tile)
    if first >= end:
        return
    row_M = first + tl.arange(0, M)
    inside_M = tl.minimum(row_M, end - 1)
    col_N = block * N + tl.arange(0, N)
    shift = expert * columns * depth
    acc_MN = tl.zeros((M, N), tl.float32)
    acc_MN, _ = add_products(
        acc_MN, acc_MN, a_ptr, inside_M, b_ptr + shift, None, col_N, 1, columns, columns, depth,
        INSIDE, K, EVEN, PRECISION,
    )  # fmt: skip
    if a2_ptr is not None:
        acc_MN, _ = add_products(
            acc_MN, acc_MN, a2_ptr, inside_M, b2_ptr + shift, None, col_N, 1, columns, columns, depth,
            INSIDE, K, EVEN, PRECISION,
        )  # fmt: skip
    if bias_ptr is not None:
        bias_N = tl.load(bias_ptr + expert * columns + col_N, mask=col_N < columns, other=0.0)
        acc_MN += bias_N[None, :].to(tl.float32)
    if weights_ptr is not None:
        acc_MN *= tl.load(weights_ptr + tl.load(slots_ptr + inside_M))[:, None].to(tl.float32)
    target_M = row_M
    if target_ptr is not None:
        target_M = tl.load(target_ptr + inside_M)
    out_MN = target_M[:, None] * columns + col_N[None, :]
    mask_MN = (row_M < end)[:, None] & (col_N < columns)[None, :]
    tl.store(out_ptr + out_MN, rounded(acc_MN, out_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def sum_rows(
    rows_ptr, rows_XK_ptr, kept_ptr, out_ptr, num_x, width, TOP_K: tl.constexpr, X: tl.constexpr, D: tl.constexpr
):
    """out[x] = sum over kept k of rows[rows_XK[x, k]], in fp32 and always in the order of k."""
    x_X = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    col_D = tl.program_id(1) * D + tl.arange(0, D)
    acc_XD = tl.zeros((X, D), tl.float32)
    for k in tl.static_range(TOP_K):
        kept_X = tl.load(kept_ptr + x_X * TOP_K + k, mask=x_X < num_x, other=0) != 0
        row_X = tl.load(rows_XK_ptr + x_X * TOP_K + k, mask=kept_X, other=0)
        mask_XD = kept_X[:, None] & (col_D < width)[None, :]
        acc_XD += tl.load(rows_ptr + row_X[:, None] * width + col_D[None, :], mask=mask_XD, other=0.0).to(tl.float32)
    mask_XD = (x_X < num_x)[:, None] & (col_D < width)[None, :]
    tl.store(out_ptr + x_X[:, None] * width + col_D[None, :], rounded(acc_XD, out_ptr.dtype.element_ty), mask=mask_XD)


def run_up(
    x_XD: Tensor, order: RowOrder, tiles_3T: Tensor, w: ExpertWeights, function: str, tiling: ExpertTiling
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(pre_gate, pre_up, act), each [R, F]; pre_gate is None without a gate."""
    d_ff, d_model = w.up.shape[1:]
    block, tiles = tiling.up, tiles_3T.shape[1]

    def buffer() -> Tensor:
        return torch.empty(order.slots_R.numel(), d_ff, dtype=x_XD.dtype, device=x_XD.device)

    pre_gate, pre_up, act = buffer() if w.gate is not None else None, buffer(), buffer()
    if order.slots_R.numel():
        blocks = triton.cdiv(d_ff, block.n)
        up_projection[(tiles * blocks,)](
            x_XD, order.source_R, tiles_3T, w.gate, w.up, w.gate_bias, w.up_bias, pre_gate, pre_up, act,
            tiles, d_ff, d_model, blocks, function, w.gate is not None,
            tiling.rows, block.n, block.k, d_model % block.k == 0, block.halves, GROUP, tiling.precision,
            num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
    return pre_gate, pre_up, act


def run_down(
    products: list[tuple[Tensor, Tensor]],
    bias_eD: Tensor | None,
    weights_XK: Tensor | None,
    order: RowOrder,
    tiles_3T: Tensor,
    tiling: ExpertTiling,
    backward: bool = False,
) -> Tensor:
    """y[x] = sum over kept k of weight * (a_1 B_1 + .. + bias) for one or two pairs (a [R, F], B [e, F, D]): [X, D].

    With one assignment for each row of x the product writes its rows where they belong, and there is nothing to sum.
    """
    (a_RF, b_eFD), (a2_RF, b2_eFD) = products[0], products[1] if len(products) > 1 else (None, None)
    (num_x, top_k), (_, d_ff, d_model) = order.rows_XK.shape, b_eFD.shape
    num_rows, tiles, block = order.slots_R.numel(), tiles_3T.shape[1], tiling.input_grad if backward else tiling.down

    def zeros() -> Tensor:
        return torch.zeros(num_x, d_model, dtype=a_RF.dtype, device=a_RF.device)

    if num_rows == 0:
        return zeros()
    alone = top_k == 1
    out = zeros() if alone else torch.empty(num_rows, d_model, dtype=a_RF.dtype, device=a_RF.device)
    blocks = triton.cdiv(d_model, block.n)
    down_projection[(tiles * blocks,)](
        a_RF, a2_RF, b_eFD, b2_eFD, bias_eD, weights_XK, order.slots_R, order.source_R if alone else None,
        tiles_3T, out, tiles, d_model, d_ff, blocks,
        tiling.rows, block.n, block.k, d_ff % block.k == 0, d_model % block.n == 0, GROUP, tiling.precision,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return out if alone else _sum(out, order)


def _sum(rows_RD: Tensor, order: RowOrder) -> Tensor:
    (num_x, top_k), width = order.rows_XK.shape, rows_RD.shape[1]
    y_XD = torch.empty(num_x, width, dtype=rows_RD.dtype, device=rows_RD.device)
    rows, columns = 4, min(512, triton.next_power_of_2(width))
    sum_rows[(triton.cdiv(num_x, rows), triton.cdiv(width, columns))](
        rows_RD, order.rows_XK, order.kept_XK, y_XD, num_x, width, top_k, rows, columns
    )
    return y_XD
