"""What a caller may give an attention layer beside x: keys and values of the past, a mask over keys, a bias.

Legend: B batch, H query heads, G key/value heads, S new tokens, K keys (past and new), P width of a head.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_dist.attention.kv_cache import KVCache

Pair = tuple[Tensor, Tensor]
Past = KVCache | Pair | tuple[()] | None
"""None: no cache. (): start one. (k, v), each [B, G, past, P]: what an earlier call returned. Or a KVCache."""


def check_past(past: Any, rows: int, heads: int, width: int) -> int:
    """Tokens in the past (in its longest row). Raises ValueError for what is no Past, or not of these sizes."""
    if past is None:
        return 0
    if isinstance(past, KVCache):
        past.check_room(rows, 0)
        return past.cache_position
    if not isinstance(past, tuple | list) or len(past) not in (0, 2):
        raise ValueError(
            f"past_key_value is {_named(past)}: give None, () to start a cache, the pair (key, value) that an earlier "
            "call returned, or a KVCache"
        )
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else None for t in past]
    for shape in shapes:
        if shape != shapes[0] or shape is None or len(shape) != 4 or (*shape[:2], shape[3]) != (rows, heads, width):
            raise ValueError(
                f"past_key_value has shapes {', '.join(map(str, shapes))}, but keys and values must both be [B, G, "
                f"past, P] with B={rows}, G={heads} (key/value heads of this rank), P={width}"
            )
    return shapes[0][2] if shapes and shapes[0] else 0


def extend(past: Past, k_BGSP: Tensor, v_BGSP: Tensor) -> tuple[Tensor, Tensor, KVCache | Pair | None]:
    """All keys and values [B, G, K, P], and what the next call is given. What is kept is not differentiable."""
    if past is None:
        return k_BGSP, v_BGSP, None
    if isinstance(past, KVCache):
        return *past.update(k_BGSP, v_BGSP), past
    if past:
        k_BGSP, v_BGSP = (torch.cat((old.to(new), new), 2) for old, new in zip(past, (k_BGSP, v_BGSP), strict=True))
    return k_BGSP, v_BGSP, (k_BGSP.detach(), v_BGSP.detach())


def check_mask(mask: Any, rows: int, keys: int) -> Tensor | None:
    """bool [B, K], True where a key may be seen."""
    if mask is None:
        return None
    kind = mask.dtype if isinstance(mask, Tensor) else None
    if kind is None or kind.is_floating_point or kind.is_complex:
        raise ValueError(
            f"attention_mask is {_named(mask)}, but must be bool or integers 0 and 1, True or 1 where a key may be "
            "seen; what is added to scores goes into bias"
        )
    if tuple(mask.shape) != (rows, keys):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but must be {(rows, keys)}: one entry for each key, those "
            "of the past counted"
        )
    if kind is torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask has integers other than 0 and 1: 1 where a key may be seen, 0 elsewhere")
    return mask.bool()


def check_bias(bias: Any, rows: int, heads: int, queries: int, keys: int, ragged: bool) -> Tensor | None:
    """The bias, cut to its last S and K, with four dimensions. ragged: rows of the cache have different lengths."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise ValueError(
            f"bias is {_named(bias)}, but must be a tensor of floating-point numbers, added to the scores; what may be "
            "seen goes into attention_mask"
        )
    if bias.dim() > 4:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: more than the four dimensions (B, H, Sq, Sk)")
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    wanted = (rows, heads, queries, keys)
    fits = all(have in (1, want) for have, want in zip(shape[:2], wanted[:2], strict=True))
    if not fits or any(have != 1 and have < want for have, want in zip(shape[2:], wanted[2:], strict=True)):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, which does not broadcast to (B, H, Sq, Sk) = {wanted}: its last two "
            "dimensions may be longer (their last entries are used), but not shorter"
        )
    if ragged and shape[2] > max(queries, 1):
        raise ValueError(
            f"bias has {shape[2]} queries, but rows of the cache end at different positions: give it {queries}, those "
            "of this call"
        )
    bias = bias.reshape(shape)
    return bias[:, :, shape[2] - queries if shape[2] > queries else 0 :, shape[3] - keys if shape[3] > keys else 0 :]


def check_lengths(cu_seqlens: Any, tokens: int, of_rows: dict[str, Any], needs_weights: bool) -> tuple[Tensor, int]:
    """(cu_seqlens as int32 [N + 1], the longest sequence). of_rows: what packed sequences cannot have."""
    given = [name for name, value in of_rows.items() if value is not None] + ["needs_weights"] * needs_weights
    if given:
        raise ValueError(
            f"packed sequences (cu_seqlens) take no {', '.join(given)}: give x [B, S, D] and a mask instead"
        )
    whole = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not whole or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens is {_named(cu_seqlens)}, but must be a tensor [N + 1] of int32 or int64")
    starts = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens goes from {starts[0]} to {starts[-1]}, but must rise from 0 to the {tokens} tokens of x: "
            "where each sequence starts, and where the last one ends"
        )
    return cu_seqlens.int(), max(lengths, default=0)


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
