"""Local causal attention at a cost of S * W: the sequence is cut into buckets that look at themselves and one before.

Legend: B batch, S sequence, H query heads, G key/value heads, P width of a head, W keys before a query that it sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.attention.backend import Attend
from moe_dist.kernels.attention.pattern import Dropout, Pattern


def local_attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, attend: Attend, window: int, dropout: Dropout | None = None
) -> Tensor:
    """Query t sees the keys t - window to t, itself included: window + 1 of them -> [B, S, H, P]."""
    batch, length = q_BSHP.shape[:2]
    if length <= window + 1:
        return _attend(q_BSHP, k_BSGP, v_BSGP, attend, Pattern(dropout=part_of(dropout, "first", 1)))
    buckets = -(-length // window)
    q_BSHP, k_BSGP, v_BSGP = (F.pad(t, (0, 0, 0, 0, 0, buckets * window - length)) for t in (q_BSHP, k_BSGP, v_BSGP))
    q_BWHP, k_BWGP, v_BWGP = (t[:, :window] for t in (q_BSHP, k_BSGP, v_BSGP))
    first_BWHP = _attend(q_BWHP, k_BWGP, v_BWGP, attend, Pattern(dropout=part_of(dropout, "first", 1)))
    # The others are rows of their own, b * (buckets - 1) + bucket; their keys are the bucket before and their own.
    q_NWHP = q_BSHP[:, window:].reshape(-1, window, *q_BSHP.shape[2:])
    k_NKGP, v_NKGP = (_with_bucket_before(t, window) for t in (k_BSGP, v_BSGP))
    pattern = Pattern(window=window + 1, dropout=part_of(dropout, "rest", buckets - 1))
    rest_NWHP = _attend(q_NWHP, k_NKGP, v_NKGP, attend, pattern)
    y_BSHP = torch.cat((first_BWHP, rest_NWHP.reshape(batch, -1, *first_BWHP.shape[2:])), dim=1)
    return y_BSHP[:, :length]


def _attend(q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, attend: Attend, pattern: Pattern) -> Tensor:
    q_BHSP, k_BGSP, v_BGSP = (t.transpose(1, 2) for t in (q_BSHP, k_BSGP, v_BSGP))
    return attend(q_BHSP, k_BGSP, v_BGSP, pattern, None).transpose(1, 2)


def _with_bucket_before(t_BSGP: Tensor, window: int) -> Tensor:
    t_BnWGP = t_BSGP.unflatten(1, (-1, window))
    return torch.cat((t_BnWGP[:, :-1], t_BnWGP[:, 1:]), dim=2).flatten(0, 1)


def part_of(dropout: Dropout | None, name: str, rows: int = 1) -> Dropout | None:
    """That of one attention among several; it has `rows` rows for each of the batch."""
    if dropout is None:
        return None
    return Dropout(dropout.rate, dropout.key.fold(name), dropout.first_row * rows, dropout.first_head, dropout.heads)
