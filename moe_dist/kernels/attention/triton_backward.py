"""The backward kernels (FlashAttention-2, arXiv 2307.08691, algorithm 2): weights are computed again from lse.

With w the weights, dw = dO v^T and delta = rowsum(dO * O): dv = w^T dO, ds = w (dw - delta), dq = ds k, dk = ds^T q.
The bias's gradient is ds, a sink's the sum of -w_sink delta. One kernel has a tile of rows and passes over the keys
(dq, ds, delta), the other a tile of keys and passes over the rows. So nothing is added atomically and the bits repeat.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, S splits; in kernels M rows and
N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.attention.triton_call import Call, choose_splits, strides
from moe_dist.kernels.attention.triton_parts import (
    SIZES,
    base,
    growth,
    kept,
    key_bounds,
    key_offsets,
    load_rows,
    offsets,
    place,
    row_bounds,
    rows_of,
    scores,
    sequence,
    share,
    store_rows,
)
from moe_dist.kernels.tile import add_product, rounded


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, grad_ptr, grad_q_ptr, grad_bias_ptr, delta_ptr,
    cu_q_ptr, cu_k_ptr, starts_ptr, seen_ptr, slopes_ptr, bias_ptr,
    q_b, q_h, q_q, k_b, k_g, k_k, v_b, v_g, v_k, out_b, out_h, out_q, grad_b, grad_h, grad_q,
    dq_b, dq_h, dq_q, bias_b, bias_h, bias_q, bias_k,
    tiles, queries, keys, groups, scale, window, seed, threshold, first_pair, pairs,
    CAUSAL: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of rows, and ds where grad_bias (fp32 [B, H, Q, K], zeros) is not None."""
    batch, group, tile = place(tiles, groups)
    tile = tiles - 1 - tile  # those with most keys first
    total_queries = queries
    row, first_q, queries, first_k, keys, start = sequence(cu_q_ptr, cu_k_ptr, starts_ptr, batch, queries, keys)
    if tile * M >= queries * R:
        return
    real_M, query_M, member_M = rows_of(tile * M, queries, R, M)
    head, token, step_M = group * R, first_q + tile * M // R, query_M - tile * M // R
    position_M, head_M = start + query_M, head + member_M
    at_M = member_M * total_queries + step_M  # of lse and delta
    lse_ptr = base(lse_ptr, row, head, token, groups * R * total_queries, total_queries, 1)
    delta_ptr = base(delta_ptr, row, head, token, groups * R * total_queries, total_queries, 1)
    out_ptr = base(out_ptr, row, head, token, out_b, out_h, out_q)
    grad_ptr = base(grad_ptr, row, head, token, grad_b, grad_h, grad_q)
    out_MP = load_rows(out_ptr, offsets(member_M, step_M, out_h, out_q, WIDE), None, WIDTH, P)
    grad_MP = load_rows(grad_ptr, offsets(member_M, step_M, grad_h, grad_q, WIDE), None, WIDTH, P)
    delta_M = tl.sum(out_MP.to(tl.float32) * grad_MP.to(tl.float32), 1)
    tl.store(delta_ptr + at_M, delta_M, mask=real_M)
    lse_M = tl.load(lse_ptr + at_M)
    q_MP = load_rows(
        base(q_ptr, row, head, token, q_b, q_h, q_q), offsets(member_M, step_M, q_h, q_q, WIDE), None, WIDTH, P
    )
    k_ptr = base(k_ptr, row, group, first_k, k_b, k_g, k_k)
    v_ptr = base(v_ptr, row, group, first_k, v_b, v_g, v_k)
    slope, bias_rows = None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head_M).to(tl.float32)[:, None]
    if bias_ptr is not None:
        bias_rows = (bias_ptr + row * bias_b + head_M * bias_h + query_M.to(tl.int64) * bias_q)[:, None]
    if seen_ptr is not None:
        seen_ptr += row * keys
    if seed is not None:
        pair = (first_pair + batch * pairs + head_M)[:, None]
    acc_MP = tl.zeros((M, P), tl.float32)
    k_offset_N, v_offset_N = key_offsets(N, k_k, WIDE), key_offsets(N, v_k, WIDE)
    last = start + tl.minimum(tile * M + M - 1, queries * R - 1) // R
    bounds = key_bounds(start + tile * M // R, last, keys, window, CAUSAL, N)
    for part in tl.static_range(3):
        if part > 0 or window is not None:
            for key in range(bounds[part], bounds[part + 1], N):
                key_N = key + tl.arange(0, N)
                inside_N = None
                if part != 1:
                    inside_N = key_N < keys
                k_NP = load_rows(k_ptr + tl.cast(key, tl.int64) * k_k, k_offset_N, inside_N, WIDTH, P)
                products_MN = add_product(tl.zeros((M, N), tl.float32), q_MP, tl.trans(k_NP), PRECISION)
                score_MN = scores(
                    products_MN, scale, position_M[:, None], key_N[None, :], keys, slope, bias_rows, bias_k, seen_ptr,
                    window, CAUSAL, part != 1,
                )  # fmt: skip
                weight_MN = tl.exp2(score_MN - lse_M[:, None])
                v_NP = load_rows(v_ptr + tl.cast(key, tl.int64) * v_k, v_offset_N, inside_N, WIDTH, P)
                dw_MN = add_product(tl.zeros((M, N), tl.float32), grad_MP, tl.trans(v_NP), PRECISION)
                if seed is not None:
                    keep_MN = kept(pair, position_M[:, None], key_N[None, :], seed, threshold)
                    dw_MN = tl.where(keep_MN, dw_MN * growth(threshold), 0.0)
                ds_MN = weight_MN * (dw_MN - delta_M[:, None])
                if grad_bias_ptr is not None:
                    mask_MN = real_M[:, None] & (key_N < keys)[None, :]
                    line_M = (row * groups * R + head_M) * queries + query_M
                    tl.store(grad_bias_ptr + line_M[:, None] * keys + key_N[None, :], ds_MN, mask=mask_MN)
                acc_MP = add_product(acc_MP, rounded(ds_MN, k_ptr.dtype.element_ty), k_NP, PRECISION)
    acc_MP = rounded(acc_MP * scale, grad_q_ptr.dtype.element_ty)
    grad_q_ptr = base(grad_q_ptr, row, head, token, dq_b, dq_h, dq_q)
    store_rows(grad_q_ptr, offsets(member_M, step_M, dq_h, dq_q, WIDE), acc_MP, real_M, WIDTH, P)


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_ptr, grad_k_ptr, grad_v_ptr,
    cu_q_ptr, cu_k_ptr, starts_ptr, seen_ptr, slopes_ptr, bias_ptr,
    q_b, q_h, q_q, k_b, k_g, k_k, v_b, v_g, v_k, grad_b, grad_h, grad_q,
    dk_s, dk_b, dk_g, dk_k, dv_s, dv_b, dv_g, dv_k, bias_b, bias_h, bias_q, bias_k,
    tiles, splits, queries, keys, groups, scale, window, seed, threshold, first_pair, pairs,
    CAUSAL: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys from all rows of their group, or from one split of them.

    Scores are computed with keys as rows, so that weights are the left factor of dv, and ds of dk, as they are.
    """
    batch, group, inside = place(tiles * splits, groups)
    tile = inside // splits
    total_queries = queries
    row, first_q, queries, first_k, keys, start = sequence(cu_q_ptr, cu_k_ptr, starts_ptr, batch, queries, keys)
    if tile * N >= keys:
        return
    key_N = tile * N + tl.arange(0, N)
    inside_N = key_N < keys
    token = first_k + tile * N
    k_NP = load_rows(base(k_ptr, row, group, token, k_b, k_g, k_k), key_offsets(N, k_k, WIDE), inside_N, WIDTH, P)
    v_NP = load_rows(base(v_ptr, row, group, token, v_b, v_g, v_k), key_offsets(N, v_k, WIDE), inside_N, WIDTH, P)
    head = group * R
    q_ptr = base(q_ptr, row, head, first_q, q_b, q_h, q_q)
    grad_ptr = base(grad_ptr, row, head, first_q, grad_b, grad_h, grad_q)
    lse_ptr = base(lse_ptr, row, head, first_q, groups * R * total_queries, total_queries, 1)
    delta_ptr = base(delta_ptr, row, head, first_q, groups * R * total_queries, total_queries, 1)
    if seen_ptr is not None:
        seen_ptr += row * keys
    grad_k_NP = tl.zeros((N, P), tl.float32)
    grad_v_NP = tl.zeros((N, P), tl.float32)
    bounds = share(
        row_bounds(tile * N, tile * N + N - 1, start, queries, window, CAUSAL, R, M), inside % splits, splits, M
    )  # fmt: skip
    for part in tl.static_range(3):
        if part == 1 or window is not None or (part == 0 and CAUSAL):
            for first in range(bounds[part], bounds[part + 1], M):
                real_M, query_M, member_M = rows_of(first, queries, R, M)
                query, step_M = first // R, query_M - first // R
                position_M, head_M = start + query_M, head + member_M
                at_M = member_M * total_queries + query_M
                lse_M = tl.load(lse_ptr + at_M, mask=real_M, other=float("inf"))
                delta_M = tl.load(delta_ptr + at_M, mask=real_M, other=0.0)
                offset_M = offsets(member_M, step_M, q_h, q_q, WIDE)
                q_MP = load_rows(q_ptr + tl.cast(query, tl.int64) * q_q, offset_M, None, WIDTH, P)
                products_NM = add_product(tl.zeros((N, M), tl.float32), k_NP, tl.trans(q_MP), PRECISION)
                slope, bias_rows = None, None
                if slopes_ptr is not None:
                    slope = tl.load(slopes_ptr + head_M).to(tl.float32)[None, :]
                if bias_ptr is not None:
                    bias_M = bias_ptr + row * bias_b + head_M * bias_h + query_M.to(tl.int64) * bias_q
                    bias_rows = bias_M[None, :]
                score_NM = scores(
                    products_NM, scale, position_M[None, :], key_N[:, None], keys, slope, bias_rows, bias_k, seen_ptr,
                    window, CAUSAL, part != 1,
                )  # fmt: skip
                weight_NM = tl.exp2(score_NM - lse_M[None, :])
                offset_M = offsets(member_M, step_M, grad_h, grad_q, WIDE)
                grad_MP = load_rows(grad_ptr + tl.cast(query, tl.int64) * grad_q, offset_M, None, WIDTH, P)
                dw_NM = add_product(tl.zeros((N, M), tl.float32), v_NP, tl.trans(grad_MP), PRECISION)
                kept_NM = weight_NM
                if seed is not None:
                    pair = (first_pair + batch * pairs + head_M)[None, :]
                    keep_NM = kept(pair, position_M[None, :], key_N[:, None], seed, threshold)
                    kept_NM = tl.where(keep_NM, weight_NM * growth(threshold), 0.0)
                    dw_NM = tl.where(keep_NM, dw_NM * growth(threshold), 0.0)
                grad_v_NP = add_product(grad_v_NP, rounded(kept_NM, q_ptr.dtype.element_ty), grad_MP, PRECISION)
                ds_NM = rounded(weight_NM * (dw_NM - delta_M[None, :]), q_ptr.dtype.element_ty)
                grad_k_NP = add_product(grad_k_NP, ds_NM, q_MP, PRECISION)
    grad_k_NP = rounded(grad_k_NP * scale, grad_k_ptr.dtype.element_ty)
    grad_v_NP = rounded(grad_v_NP, grad_v_ptr.dtype.element_ty)
    split = (inside % splits).to(tl.int64)
    grad_k_ptr = base(grad_k_ptr + split * dk_s, row, group, token, dk_b, dk_g, dk_k)
    grad_v_ptr = base(grad_v_ptr + split * dv_s, row, group, token, dv_b, dv_g, dv_k)
    store_rows(grad_k_ptr, key_offsets(N, dk_k, WIDE), grad_k_NP, inside_N, WIDTH, P)
    store_rows(grad_v_ptr, key_offsets(N, dv_k, WIDE), grad_v_NP, inside_N, WIDTH, P)


def run_query_gradient(
    grad_BHQP: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out_BHQP: Tensor,
    lse_BHQ: Tensor,
    call: Call,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dq, delta, ds [B, H, Q, K] in fp32 where it is wanted); inputs: q, k, v and the bias."""
    q_BHQP, k_BGKP = inputs[:2]
    tile = call.tiling.grad_q
    tiles = triton.cdiv(call.rows(q_BHQP, k_BGKP), tile.rows)
    grad_q, delta = torch.empty_like(q_BHQP), torch.empty_like(lse_BHQ)
    grad_scores = None
    if wants_bias:  # tiles that no row sees are never visited
        shape = (*q_BHQP.shape[:3], k_BGKP.shape[2])
        grad_scores = torch.zeros(shape, dtype=torch.float32, device=q_BHQP.device)
    if programs := tiles * call.pairs(k_BGKP):
        query_gradient[(programs,)](
            **call.arguments(*inputs, grad_BHQP, out_BHQP, grad_q),
            **dict(out_ptr=out_BHQP, lse_ptr=lse_BHQ, grad_ptr=grad_BHQP, grad_q_ptr=grad_q, delta_ptr=delta),
            **dict(grad_bias_ptr=grad_scores, tiles=tiles),
            **strides("out", "bhq", out_BHQP),
            **strides("grad", "bhq", grad_BHQP),
            **strides("dq", "bhq", grad_q),
            **tile.options(),
        )
    return grad_q, delta, grad_scores


def run_key_value_gradient(
    grad_BHQP: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    lse_BHQ: Tensor,
    delta_BHQ: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """(dk, dv). With few key/value heads the rows are cut into splits, whose sums in fp32 are added afterwards."""
    q_BHQP, k_BGKP, v_BGKP, _ = inputs
    tile = call.tiling.grad_kv
    tiles = triton.cdiv(call.keys(k_BGKP), tile.keys)
    programs = tiles * call.pairs(k_BGKP)
    splits = choose_splits(programs, triton.cdiv(call.rows(q_BHQP, k_BGKP), tile.rows), 8)
    if splits == 1:
        grad_k, grad_v = torch.empty_like(k_BGKP)[None], torch.empty_like(v_BGKP)[None]
    else:
        grad_k, grad_v = (torch.empty(splits, *t.shape, dtype=torch.float32, device=t.device) for t in (k_BGKP, v_BGKP))
    if programs:
        key_value_gradient[(programs * splits,)](
            **call.arguments(*inputs, grad_BHQP, grad_k[0], grad_v[0]),
            **dict(lse_ptr=lse_BHQ, delta_ptr=delta_BHQ, grad_ptr=grad_BHQP, grad_k_ptr=grad_k, grad_v_ptr=grad_v),
            **dict(tiles=tiles, splits=splits),
            **strides("grad", "bhq", grad_BHQP),
            **strides("dk", "sbgk", grad_k),
            **strides("dv", "sbgk", grad_v),
            **tile.options(),
        )
    if splits == 1:
        return grad_k[0], grad_v[0]
    return grad_k.sum(0).to(k_BGKP.dtype), grad_v.sum(0).to(v_BGKP.dtype)
