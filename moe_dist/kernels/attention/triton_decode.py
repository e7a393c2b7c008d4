"""Few queries against many keys, as in generation: the keys are cut into splits, whose softmaxes are then put together.

Without splits only B * G programs would read the whole cache (Flash-Decoding).

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, S splits; in the kernel
P and S are the next powers of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.attention.triton_call import Call, choose_splits, strides
from moe_dist.kernels.attention.triton_forward import run_forward
from moe_dist.kernels.attention.triton_parts import LOG2E
from moe_dist.kernels.tile import rounded

FEW_ROWS = 64  # queries times query heads of a key/value head: more of them are programs enough
_KEYS = 256  # of a split, at least


@triton.jit
def combine(
    parts_ptr, lse_ptr, sinks_ptr, out_ptr, out_b, out_h, out_q, rows, heads, queries, splits,
    S: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """out = sum over splits of 2^lse * part / sum of 2^lse, for one query of one head."""
    row = tl.program_id(0).to(tl.int64)
    query, head, batch = row % queries, row // queries % heads, row // queries // heads
    split_S, col_P = tl.arange(0, S), tl.arange(0, P)
    at_S = split_S * rows + row
    lse_S = tl.load(lse_ptr + at_S, mask=split_S < splits, other=float("inf"))
    lse_S = tl.where(lse_S == float("inf"), float("-inf"), lse_S)  # nothing seen
    top = tl.max(lse_S, 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_S = tl.exp2(lse_S - top)
    total = tl.sum(weight_S, 0)
    if sinks_ptr is not None:
        total += tl.exp2(sink - top)
    mask_SP = (split_S < splits)[:, None] & (col_P < WIDTH)[None, :]
    parts_SP = tl.load(parts_ptr + at_S[:, None] * WIDTH + col_P[None, :], mask=mask_SP, other=0.0)
    sum_P = tl.sum(parts_SP * weight_S[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    at_P = batch * out_b + head * out_h + query * out_q + col_P
    tl.store(out_ptr + at_P, rounded(sum_P, out_ptr.dtype.element_ty), mask=col_P < WIDTH)


def decode_splits(q_BHQP: Tensor, k_BGKP: Tensor, call: Call) -> int:
    """How many splits pay, from shapes alone; 1 means that the ordinary forward kernel does it."""
    if call.rows(q_BHQP, k_BGKP) > FEW_ROWS:
        return 1
    tile = call.tiling.forward
    steps = triton.cdiv(call.keys(k_BGKP), tile.keys)
    return choose_splits(call.pairs(k_BGKP), steps, max(_KEYS // tile.keys, 1))


def decode(
    q_BHQP: Tensor,
    k_BGKP: Tensor,
    v_BGKP: Tensor,
    bias: Tensor | None,
    sinks_H: Tensor | None,
    call: Call,
    splits: int,
) -> Tensor:
    """Attention without a backward pass, [B, H, Q, P]."""
    (_, heads, queries, width), out = q_BHQP.shape, torch.empty_like(q_BHQP)
    parts, lse = run_forward(q_BHQP, k_BGKP, v_BGKP, bias, None, call, splits)
    if rows := out[..., 0].numel():
        combine[(rows,)](
            **dict(parts_ptr=parts, lse_ptr=lse, sinks_ptr=sinks_H, out_ptr=out),
            **strides("out", "bhq", out),
            **dict(rows=rows, heads=heads, queries=queries, splits=splits),
            **dict(S=triton.next_power_of_2(splits), WIDTH=width, P=max(16, triton.next_power_of_2(width))),
        )
    return out
