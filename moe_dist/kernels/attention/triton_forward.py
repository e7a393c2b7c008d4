"""The forward kernel: softmax in one pass over the keys (FlashAttention-2, arXiv 2307.08691, algorithm 1).

Where programs are few, the keys are cut into splits, each with its own softmax; triton_decode.py puts them together.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, S splits; in kernels M rows and
N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.attention.triton_call import Call, strides
from moe_dist.kernels.attention.triton_parts import (
    LOG2E,
    SIZES,
    base,
    growth,
    kept,
    key_bounds,
    key_offsets,
    load_rows,
    offsets,
    place,
    rows_of,
    scores,
    sequence,
    share,
    store_rows,
)
from moe_dist.kernels.tile import add_product, rounded


@triton.jit(do_not_specialize=SIZES)
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, starts_ptr, seen_ptr, slopes_ptr, bias_ptr, sinks_ptr,
    q_b, q_h, q_q, k_b, k_g, k_k, v_b, v_g, v_k, out_s, out_b, out_h, out_q, lse_s, bias_b, bias_h, bias_q, bias_k,
    tiles, splits, queries, keys, groups, scale, window, seed, threshold, first_pair, pairs,
    CAUSAL: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows against its keys, or one split of them. lse is in base 2, and +inf where no key is seen: so that
    every weight that backward makes of it is 0."""
    batch, group, inside = place(tiles * splits, groups)
    tile = tiles - 1 - inside // splits  # those with most keys first
    total_queries = queries
    row, first_q, queries, first_k, keys, start = sequence(cu_q_ptr, cu_k_ptr, starts_ptr, batch, queries, keys)
    if tile * M >= queries * R:
        return
    real_M, query_M, member_M = rows_of(tile * M, queries, R, M)
    head, token, step_M = group * R, first_q + tile * M // R, query_M - tile * M // R
    position_M, head_M = start + query_M, head + member_M
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
    # A sink is the first key, with a value of zeros.
    top_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    if sinks_ptr is not None:
        top_M = tl.load(sinks_ptr + head_M).to(tl.float32) * LOG2E
        sum_M += 1.0
    acc_MP = tl.zeros((M, P), tl.float32)
    k_offset_N, v_offset_N = key_offsets(N, k_k, WIDE), key_offsets(N, v_k, WIDE)
    last = start + tl.minimum(tile * M + M - 1, queries * R - 1) // R
    bounds = share(
        key_bounds(start + tile * M // R, last, keys, window, CAUSAL, N), inside % splits, splits, N
    )  # fmt: skip
    for part in tl.static_range(3):  # window's edge, keys that all rows see, the diagonal or the last keys
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
                new_M = tl.maximum(top_M, tl.max(score_MN, 1))
                safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
                weight_MN = tl.exp2(score_MN - safe_M[:, None])
                shrink_M = tl.exp2(top_M - safe_M)
                sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
                top_M = new_M
                if seed is not None:
                    keep_MN = kept(pair, position_M[:, None], key_N[None, :], seed, threshold)
                    weight_MN = tl.where(keep_MN, weight_MN, 0.0)
                v_NP = load_rows(v_ptr + tl.cast(key, tl.int64) * v_k, v_offset_N, inside_N, WIDTH, P)
                acc_MP = add_product(
                    acc_MP * shrink_M[:, None], rounded(weight_MN, v_ptr.dtype.element_ty), v_NP, PRECISION
                )  # fmt: skip
    seen_M = top_M > float("-inf")
    safe_M = tl.where(seen_M, sum_M, 1.0)
    factor_M = 1.0 / safe_M
    if seed is not None:
        factor_M *= growth(threshold)
    out = rounded(acc_MP * factor_M[:, None], out_ptr.dtype.element_ty)
    split = (inside % splits).to(tl.int64)
    out_ptr = base(out_ptr + split * out_s, row, head, token, out_b, out_h, out_q)
    store_rows(out_ptr, offsets(member_M, step_M, out_h, out_q, WIDE), out, real_M, WIDTH, P)
    lse_M = tl.where(seen_M, top_M + tl.log2(safe_M), float("inf"))
    lse_ptr = base(lse_ptr + split * lse_s, row, head, token, groups * R * total_queries, total_queries, 1)
    tl.store(lse_ptr + member_M * total_queries + step_M, lse_M, mask=real_M)


def run_forward(
    q_BHQP: Tensor,
    k_BGKP: Tensor,
    v_BGKP: Tensor,
    bias: Tensor | None,
    sinks_H: Tensor | None,
    call: Call,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """(out [S, B, H, Q, P], lse fp32 [S, B, H, Q]); out is fp32 where there are several splits."""
    tile, tiles = call.tiling.forward, triton.cdiv(call.rows(q_BHQP, k_BGKP), call.tiling.forward.rows)
    if splits == 1:
        out = torch.empty_like(q_BHQP)[None]
    else:
        out = torch.empty(splits, *q_BHQP.shape, dtype=torch.float32, device=q_BHQP.device)
    lse = torch.empty(splits, *q_BHQP.shape[:3], dtype=torch.float32, device=q_BHQP.device)
    if programs := tiles * splits * call.pairs(k_BGKP):
        forward[(programs,)](
            **call.arguments(q_BHQP, k_BGKP, v_BGKP, bias, out[0]),
            **dict(out_ptr=out, lse_ptr=lse, sinks_ptr=sinks_H, tiles=tiles, splits=splits, lse_s=lse.stride(0)),
            **strides("out", "sbhq", out),
            **tile.options(),
        )
    return out, lse
