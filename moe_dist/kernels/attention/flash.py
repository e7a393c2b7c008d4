"""Fused attention by torch (SDPA).

Of SDPA's kernels, cuDNN's comes first from Hopper on, where it can do what is asked and may: it took 4.2 ms where flash
took 7.3 (H100, 4 x 4096 tokens, 32 heads of 128, bf16, forward and backward; benchmarks/RESULTS.md). It is not
deterministic, so train.deterministic leaves it out.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_dist.kernels.attention.pattern import Pattern

_HOPPER = 9  # compute capability
_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_FEW = 64  # queries of a key/value head up to which they become rows of one product: decoding


def attend(
    q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern | None = None, scale: float | None = None
) -> Tensor:
    """As reference.attend by torch's scaled_dot_product_attention, keys and values shared by groups of query heads; but
    dropout draws from torch's own generator."""
    pattern = pattern or Pattern()
    (heads, queries), (groups, keys) = q_BHQP.shape[1:3], k_BGKP.shape[1:3]
    if pattern.plain(queries, keys):
        return _sdpa(q_BHQP, k_BGKP, v_BGKP, None, True, 0.0, scale)
    if pattern.sinks_H is not None:
        return _with_sinks(q_BHQP, k_BGKP, v_BGKP, pattern, scale)
    mask, empty = _mask(q_BHQP, keys, pattern)
    rate = 0.0 if pattern.dropout is None else pattern.dropout.rate
    packs = groups < heads and heads // groups * queries <= _FEW and (mask is None or mask.shape[1] == 1)
    if packs:  # the query heads of a key/value head as its queries, so that keys and values are read once
        shape, each = q_BHQP.shape, heads // groups
        q_BHQP = q_BHQP.reshape(shape[0], groups, each * queries, shape[3])
        mask = None if mask is None else mask.expand(-1, -1, queries, -1).repeat(1, 1, each, 1)
        out = _sdpa(q_BHQP, k_BGKP, v_BGKP, mask, False, rate, scale).reshape(shape)
    else:
        out = _sdpa(q_BHQP, k_BGKP, v_BGKP, mask, False, rate, scale)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _sdpa(
    q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, mask: Tensor | None, causal: bool, rate: float, scale: float | None
) -> Tensor:
    grouped = q_BHQP.shape[1] != k_BGKP.shape[1]
    if grouped and q_BHQP.device.type == "cpu" and len(k_BGKP) * k_BGKP.shape[1] < torch.get_num_threads():
        # The backward pass has one task for each key/value head: too few for the threads.
        each = q_BHQP.shape[1] // k_BGKP.shape[1]
        k_BGKP, v_BGKP, grouped = k_BGKP.repeat_interleave(each, 1), v_BGKP.repeat_interleave(each, 1), False
    with _preferred(q_BHQP.device):
        return F.scaled_dot_product_attention(
            q_BHQP, k_BGKP, v_BGKP, mask, dropout_p=rate, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def _preferred(device: torch.device) -> AbstractContextManager[None]:
    """The order in which SDPA asks its kernels whether they can."""
    there = device.type == "cuda" and torch.cuda.is_available()
    hopper = there and torch.cuda.get_device_capability(device)[0] >= _HOPPER
    if not hopper or torch.are_deterministic_algorithms_enabled():
        return nullcontext()
    order: AbstractContextManager[None] = sdpa_kernel(_ORDER, set_priority=True)
    return order


def _mask(q_BHQP: Tensor, keys: int, pattern: Pattern) -> tuple[Tensor | None, Tensor | None]:
    """(mask of four dimensions for SDPA, queries that see nothing). In the mask the latter see all keys, so that no
    number becomes NaN; their output is to be put to zero."""
    queries, device = q_BHQP.shape[2], q_BHQP.device
    visible, added = pattern.visible(queries, keys, device), pattern.added(queries, keys, device)
    at_end = queries == 1 and pattern.causal and pattern.starts_B is None and pattern.keys_BS is None
    if at_end and (pattern.window is None or pattern.window >= keys):
        visible = None  # the last position sees every key
    if added is not None:
        dtype = torch.promote_types(q_BHQP.dtype, torch.float32) if device.type == "cpu" else q_BHQP.dtype
        added = added.to(dtype)[(None,) * (4 - added.dim())]
        hidden = added == -torch.inf
        visible = ~hidden if visible is None else visible & ~hidden
    if visible is None:
        return None, None
    empty = None
    if pattern.keys_BS is not None or pattern.bias is not None:
        empty = ~visible.any(-1, keepdim=True)
        visible = visible | empty
        added = None if added is None else added.masked_fill(empty, 0.0)
    if added is None:
        return visible, empty
    return added.masked_fill(~visible, -torch.inf), empty


def _with_sinks(q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern, scale: float | None) -> Tensor:
    """A sink is one more key, of zeros, whose bias is its score; so is its value."""
    sinks_H = pattern.sinks_H
    assert sinks_H is not None
    (batch, heads, queries, _), keys = q_BHQP.shape, k_BGKP.shape[2]
    if pattern.starts_B is None:  # the last query stays at the last key that was there before
        starts_B = torch.full((batch,), keys - queries, device=q_BHQP.device)
        pattern = replace(pattern, starts_B=starts_B)
    visible, added = pattern.visible(queries, keys, q_BHQP.device), pattern.added(queries, keys, q_BHQP.device)
    wide = torch.promote_types(q_BHQP.dtype, torch.float32)
    bias: Tensor = q_BHQP.new_zeros(batch, heads, queries, keys, dtype=wide)
    if added is not None:
        bias = bias + added
    bias = bias if visible is None else bias.masked_fill(~visible, -torch.inf)
    sink = sinks_H.to(wide)[:, None, None].expand(batch, -1, queries, 1)
    mask = torch.cat((bias, sink), dim=-1).to(wide if q_BHQP.device.type == "cpu" else q_BHQP.dtype)
    k_BGKP, v_BGKP = (F.pad(t, (0, 0, 0, 1)) for t in (k_BGKP, v_BGKP))
    rate = 0.0 if pattern.dropout is None else pattern.dropout.rate
    return _sdpa(q_BHQP, k_BGKP, v_BGKP, mask, False, rate, scale)
