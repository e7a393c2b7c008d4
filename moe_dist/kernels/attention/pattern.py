"""Which keys a query sees, what is added to its scores, where packed sequences begin: what every attention backend
takes beside q, k and v.

Legend: B batch, H query heads, S sequence of keys, Q queries, K keys, N packed sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.kernels.random import RandomKey

_POSITION_BITS = 21  # positions below 2^21, and 2^21 pairs of row and head


@dataclass(frozen=True)
class Dropout:
    """Weights become zero with probability `rate`, the others grow by 1 / (1 - rate).

    Drawn by (key, global row, head, query position, key position), so every backend that can and every layout draw the
    same. first_row, first_head: global numbers of the first row and query head here; heads: query heads in all.
    """

    rate: float
    key: RandomKey
    first_row: int = 0
    first_head: int = 0
    heads: int | None = None

    def kept(self, shape: tuple[int, int, int, int], query_BQ: Tensor) -> Tensor:
        """bool [B, H, Q, K] for weights of `shape`, queries at positions query_BQ ([1 or B, Q])."""
        batch, heads, _, keys = shape
        row_B = torch.arange(self.first_row, self.first_row + batch, device=query_BQ.device)
        head_H = torch.arange(self.first_head, self.first_head + heads, device=query_BQ.device)
        pair_BH = row_B[:, None] * (self.heads or heads) + head_H
        index = (pair_BH << 2 * _POSITION_BITS)[:, :, None, None] + (query_BQ << _POSITION_BITS)[:, None, :, None]
        return self.key.keeps(index + torch.arange(keys, device=query_BQ.device), self.rate)


@dataclass(frozen=True)
class Pattern:
    """Query i of row b is at position starts_B[b] + i, key j at position j.

    causal: keys up to the query's own position. window: only the `window` nearest ones, the query's own position
    included (to both sides where not causal). starts_B: int64; None puts the last query at the last key. keys_BS: bool,
    keys that may be seen at all. slopes_H: ALiBi, adds -slope * |distance| (arXiv 2108.12409). bias: added to the
    scores, broadcastable to [B, H, Q, K]; -inf hides a key. sinks_H: a learned score of each head that takes part in
    its softmax and has no value. A query that sees no key gets zeros.
    """

    causal: bool = True
    window: int | None = None
    starts_B: Tensor | None = None
    keys_BS: Tensor | None = None
    slopes_H: Tensor | None = None
    bias: Tensor | None = None
    sinks_H: Tensor | None = None
    dropout: Dropout | None = None

    def plain(self, queries: int, keys: int) -> bool:
        """Nothing but causal attention of as many queries as keys."""
        rest = (self.starts_B, self.keys_BS, self.slopes_H, self.bias, self.sinks_H, self.dropout)
        wide = self.window is None or self.window >= keys
        return self.causal and queries == keys and wide and all(value is None for value in rest)

    def query_positions(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """[1 or B, Q]."""
        starts_B = torch.tensor([keys - queries], device=device) if self.starts_B is None else self.starts_B
        return starts_B[:, None] + torch.arange(queries, device=device)

    def distances(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """[1 or B, Q, K]: how far behind the query the key is."""
        return self.query_positions(queries, keys, device)[..., None] - torch.arange(keys, device=device)

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """bool, broadcastable to [B, H, Q, K]: what may be seen as far as positions and keys_BS say. None: all."""
        far_BQK, seen = self.distances(queries, keys, device)[:, None], []
        if self.causal:
            seen.append(far_BQK >= 0)
        if self.window is not None:
            seen.append(far_BQK < self.window)
            if not self.causal:
                seen.append(far_BQK > -self.window)
        if self.keys_BS is not None:
            seen.append(self.keys_BS[:, None, None, :])
        if not seen:
            return None
        visible = seen[0]
        for other in seen[1:]:
            visible = visible & other
        return visible

    def added(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """What is added to the scores, broadcastable to [B, H, Q, K]; at least fp32 where ALiBi takes part."""
        if self.slopes_H is None:
            return self.bias
        far_BHQK = self.distances(queries, keys, device)[:, None].abs()
        alibi = -self.slopes_H[:, None, None] * far_BHQK
        return alibi if self.bias is None else alibi + self.bias


@dataclass(frozen=True)
class PackedSequences:
    """N sequences of several lengths, one after the other without padding between them.

    Sequence n has the queries from cu_q[n] to cu_q[n + 1] and the keys from cu_k[n] to cu_k[n + 1]; cu_q and cu_k are
    int32 [N + 1], from 0 to all queries and all keys. max_q and max_k: of the longest sequence.

        lengths 3, 0 and 2:    cu_q = 0 3 3 5    max_q = 3
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @staticmethod
    def same(cu_seqlens: Tensor, longest: int) -> "PackedSequences":
        """Queries and keys are those of the same tokens."""
        return PackedSequences(cu_seqlens, cu_seqlens, longest, longest)


def check_packed(pattern: Pattern) -> None:
    """Raises ValueError for what belongs to rows of a batch."""
    cannot = [name for name in ("starts_B", "keys_BS", "bias") if getattr(pattern, name) is not None]
    if cannot:
        raise ValueError(
            f"packed sequences take no {', '.join(cannot)}: pad them to [B, H, S, P] and call attention(backend)"
        )
