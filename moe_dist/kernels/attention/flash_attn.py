"""The flash-attn package (arXiv 2307.08691): on a GPU, in fp16 and bf16, for heads of up to 256 numbers.

Its functions are called as flash-attn 2.8 documents them. What they cannot do is refused: a bias, hidden keys, sinks,
and dropout, which they would draw from a generator of their own, other numbers in every layout.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, T tokens of packed sequences.
"""

from typing import Any

import torch
from torch import Tensor

from moe_dist.kernels.attention.pattern import PackedSequences, Pattern, check_packed


def attend(
    q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern | None = None, scale: float | None = None
) -> Tensor:
    """As reference.attend. With rows at places of their own (pattern.starts_B) there is no backward pass.

    Raises ValueError for what flash-attn cannot do.
    """
    pattern = pattern or Pattern()
    options = dict(softmax_scale=scale, **_options(pattern, q_BHQP))
    q_BQHP, k_BKGP, v_BKGP = (t.transpose(1, 2) for t in (q_BHQP, k_BGKP, v_BGKP))
    if pattern.starts_B is not None:
        return _at_own_places(q_BQHP, k_BKGP, v_BKGP, pattern.starts_B, options).transpose(1, 2)
    from flash_attn import flash_attn_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    out_BQHP: Tensor = flash_attn_func(q_BQHP, k_BKGP, v_BKGP, deterministic=deterministic, **options)
    return out_BQHP.transpose(1, 2)


def attend_varlen(
    q_THP: Tensor,
    k_TGP: Tensor,
    v_TGP: Tensor,
    packed: PackedSequences,
    pattern: Pattern | None = None,
    scale: float | None = None,
) -> Tensor:
    """As varlen.one_by_one(reference.attend)."""
    from flash_attn import flash_attn_varlen_func

    pattern = pattern or Pattern()
    check_packed(pattern)
    sizes = (packed.cu_q, packed.cu_k, packed.max_q, packed.max_k)
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = _options(pattern, q_THP)
    out_THP: Tensor = flash_attn_varlen_func(
        q_THP, k_TGP, v_TGP, *sizes, softmax_scale=scale, deterministic=deterministic, **options
    )
    return out_THP


def _at_own_places(q_BQHP: Tensor, k_BKGP: Tensor, v_BKGP: Tensor, starts_B: Tensor, options: dict[str, Any]) -> Tensor:
    """Row b has starts_B[b] + Q keys, its last query at the last of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_BQHP, k_BKGP, v_BKGP)):
        raise ValueError(
            "flash-attn has no backward pass for rows at places of their own (starts_B): call it under "
            "torch.no_grad(), or use the flash, triton or torch implementation of attention"
        )
    from flash_attn import flash_attn_with_kvcache

    lengths_B = (starts_B + q_BQHP.shape[1]).int()
    out_BQHP: Tensor = flash_attn_with_kvcache(q_BQHP, k_BKGP, v_BKGP, cache_seqlens=lengths_B, **options)
    return out_BQHP


def _options(pattern: Pattern, q: Tensor) -> dict[str, Any]:
    """The pattern in the package's words. Raises ValueError for what it has none for."""
    cannot = [name for name in ("keys_BS", "bias", "sinks_H", "dropout") if getattr(pattern, name) is not None]
    if cannot:
        raise ValueError(
            f"flash-attn has no {', '.join(cannot)} that we could use: take the triton or torch implementation of "
            "attention"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash-attn computes in float16 and bfloat16, but the queries are {str(q.dtype).removeprefix('torch.')}: "
            "cast them, or use the flash implementation of attention"
        )
    far = -1 if pattern.window is None else pattern.window - 1
    return dict(
        causal=pattern.causal,
        window_size=(far, 0 if pattern.causal else far),
        alibi_slopes=None if pattern.slopes_H is None else pattern.slopes_H.float(),
    )
