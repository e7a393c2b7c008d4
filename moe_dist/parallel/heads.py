"""Attention heads over tp: which rank computes which, and how ranks trade tokens for heads.

Query heads are cut evenly. Key/value heads are cut too where tp divides their number; otherwise (multi-query above all)
each rank computes those that its own query heads read, some of them on several ranks, so that tp may be larger than
num_kv_heads and no rank is idle.

Attention needs every token of a sequence but treats each head on its own, so where tokens are cut, one all-to-all
before it and one after let them stay cut everywhere else (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1).

Legend: H query heads, G key/value heads; t tokens of this rank, T those of the group in rank order, N numbers of a
token over all heads, n those of this rank's heads.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moe_dist.parallel.collectives import exchange_rows, with_gradient
from moe_dist.parallel.mesh import Group


@dataclass(frozen=True)
class HeadAssignment:
    """The heads that one tp rank computes. Query head h of the whole layer reads key/value head h * G // H.

        6 query heads on 3 key/value heads, tp 2:    rank 0     rank 1
        queries                                      0  1  2    3  4  5
        the key/value head that each reads           0  0  1    1  2  2
        kv_held                                      0  1       1  2
        kv_owned: no earlier rank holds it           0  1          2
        reads, as places in kv_held                  0  0  1    0  1  1

    shared: some key/value heads are held by several ranks. reads: None where it is a plain repetition, such as 0 0 1 1,
    which attention does by itself.
    """

    queries: range
    kv_held: range
    kv_owned: range
    shared: bool
    reads: tuple[int, ...] | None

    @staticmethod
    def of(num_heads: int, num_kv_heads: int, tp: Group) -> "HeadAssignment":
        """num_kv_heads divides num_heads, and so does the size of tp."""
        count, readers = num_heads // tp.size, num_heads // num_kv_heads
        queries = range(tp.rank * count, (tp.rank + 1) * count)
        kv_held = range(queries[0] // readers, queries[-1] // readers + 1)
        kv_owned = range(-(-queries[0] // readers), kv_held.stop)  # its first reader is here
        reads = tuple(head // readers - kv_held.start for head in queries)
        repeated = tuple(place // (count // len(kv_held)) for place in range(count))
        return HeadAssignment(
            queries, kv_held, kv_owned, num_kv_heads % tp.size != 0, None if reads == repeated else reads
        )

    @property
    def kv_read(self) -> int:
        """Key/value heads that attention is given: those held, or one for each query head where they are picked."""
        return len(self.kv_held if self.reads is None else self.queries)


def tokens_to_heads(x_tN: Tensor, group: Group) -> Tensor:
    """[t, N] -> [T, n]: the group's tokens, this rank's part of their numbers. The gradient travels back."""
    if x_tN.shape[1] % group.size:
        raise ValueError(f"{x_tN.shape[1]} numbers of a token cannot be cut into {group.size} equal parts")
    return with_gradient(x_tN, partial(_to_heads, group), partial(_to_tokens, group)) if group.size > 1 else x_tN


def heads_to_tokens(x_Tn: Tensor, group: Group) -> Tensor:
    """[T, n] -> [t, N], the inverse."""
    return with_gradient(x_Tn, partial(_to_tokens, group), partial(_to_heads, group)) if group.size > 1 else x_Tn


def _to_heads(group: Group, x_tN: Tensor) -> Tensor:
    """Rows leave as (rank that takes these heads, token), and arrive as (rank that had these tokens, token)."""
    tokens, width = len(x_tN), x_tN.shape[1] // group.size
    by_rank = x_tN.view(tokens, group.size, width).transpose(0, 1).reshape(group.size * tokens, width)
    return _exchange_equally(by_rank, tokens, group)


def _to_tokens(group: Group, x_Tn: Tensor) -> Tensor:
    tokens, width = len(x_Tn) // group.size, x_Tn.shape[1]
    by_rank = _exchange_equally(x_Tn, tokens, group).view(group.size, tokens, width)
    return by_rank.transpose(0, 1).reshape(tokens, group.size * width)


def _exchange_equally(rows: Tensor, each: int, group: Group) -> Tensor:
    equal = (each,) * group.size
    return exchange_rows(rows, equal, equal, group)
