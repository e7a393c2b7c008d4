"""Attention with fewer key/value heads than query heads: plain maths, the oracle.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head.
"""

import torch
from torch import Tensor

from moe_dist.kernels.attention.pattern import Pattern


def attend(
    q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k^T + what is added) v over the keys that the pattern shows -> [B, H, Q, P].

    H is a multiple of G: query head h reads key/value head h * G // H. scale: P^-0.5 where None. Scores in fp32.
    """
    return attend_with_weights(q_BHQP, k_BGKP, v_BGKP, pattern, scale)[0]


def attend_with_weights(
    q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same and the weights [B, H, Q, K], after dropout."""
    pattern = pattern or Pattern()
    (batch, heads, queries, width), keys = q_BHQP.shape, k_BGKP.shape[2]
    k_BHKP, v_BHKP = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k_BGKP, v_BGKP))
    wide = torch.promote_types(q_BHQP.dtype, torch.float32)
    scores = (q_BHQP @ k_BHKP.mT).to(wide) * (width**-0.5 if scale is None else scale)
    added = pattern.added(queries, keys, q_BHQP.device)
    if added is not None:
        scores = scores + added.to(wide)
    hidden = scores == -torch.inf
    visible = pattern.visible(queries, keys, q_BHQP.device)
    if visible is not None:
        hidden = hidden | ~visible
    # The lowest finite number, and zero afterwards: a row that sees nothing has no NaN, in the gradient neither.
    scores = scores.masked_fill(hidden, torch.finfo(wide).min)
    if pattern.sinks_H is not None:
        sink = pattern.sinks_H.to(wide)[:, None, None].expand(batch, -1, queries, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1)[..., :keys].masked_fill(hidden, 0.0)
    if pattern.dropout is not None and pattern.dropout.rate > 0:
        kept = pattern.dropout.kept(
            (batch, heads, queries, keys), pattern.query_positions(queries, keys, q_BHQP.device)
        )
        weights = weights * kept / (1 - pattern.dropout.rate)
    return weights.to(v_BHKP.dtype) @ v_BHKP, weights
