"""Attention of sequences of several lengths packed one after the other, with no padding between them.

Legend: T tokens of all sequences, N sequences, H query heads, G key/value heads, P width of a head.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_dist.kernels.attention import flash_attn
from moe_dist.kernels.attention.backend import Attend, attention
from moe_dist.kernels.attention.pattern import PackedSequences, Pattern, check_packed

AttendVarlen = Callable[[Tensor, Tensor, Tensor, PackedSequences, Pattern | None, float | None], Tensor]
"""(q [T, H, P], k [T', G, P], v [T', G, P], packed, pattern, scale) -> [T, H, P].

The pattern is that of each sequence on its own, its last query at its last key; dropout counts sequences as rows.
"""


def varlen(backend: str) -> AttendVarlen:
    """triton and flash_attn take packed sequences as they are, the others one by one."""
    if backend == "triton":
        from moe_dist.kernels.attention.triton import attend_varlen

        return attend_varlen
    return flash_attn.attend_varlen if backend == "flash_attn" else one_by_one(attention(backend))


def one_by_one(attend: Attend) -> AttendVarlen:
    """`attend` for each sequence on its own, which waits for the lengths. With reference.attend it is the oracle."""

    def each(
        q_THP: Tensor,
        k_TGP: Tensor,
        v_TGP: Tensor,
        packed: PackedSequences,
        pattern: Pattern | None = None,
        scale: float | None = None,
    ) -> Tensor:
        pattern = pattern or Pattern()
        check_packed(pattern)
        lengths_q, lengths_k = packed.cu_q.diff().tolist(), packed.cu_k.diff().tolist()
        outs = []
        pieces = zip(q_THP.split(lengths_q), k_TGP.split(lengths_k), v_TGP.split(lengths_k), strict=True)
        for n, piece in enumerate(pieces):
            q_BHTP, k_BGTP, v_BGTP = (t.transpose(0, 1)[None] for t in piece)
            outs.append(attend(q_BHTP, k_BGTP, v_BGTP, _of_row(pattern, n), scale)[0].transpose(0, 1))
        return torch.cat(outs) if outs else torch.zeros_like(q_THP)

    return each


def _of_row(pattern: Pattern, n: int) -> Pattern:
    dropout = pattern.dropout
    return pattern if dropout is None else replace(pattern, dropout=replace(dropout, first_row=dropout.first_row + n))
