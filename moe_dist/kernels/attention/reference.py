"""Causal attention with fewer key/value heads than query heads: plain maths, the oracle.

Legend: B batch, H query heads, G key/value heads, S sequence, P width of a head.
"""

import torch
from torch import Tensor


def causal_attention(q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over positions up to each query's own; scores in fp32. -> [B, H, S, P]."""
    repeat = q_BHSP.shape[1] // k_BGSP.shape[1]
    k_BHSP, v_BHSP = (t.repeat_interleave(repeat, dim=1) for t in (k_BGSP, v_BGSP))
    wide = torch.promote_types(q_BHSP.dtype, torch.float32)
    scores = (q_BHSP @ k_BHSP.transpose(-1, -2)).to(wide) * q_BHSP.shape[-1] ** -0.5
    length = q_BHSP.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=q_BHSP.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1).to(v_BHSP.dtype) @ v_BHSP
