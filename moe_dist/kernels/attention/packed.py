"""Causal attention on CPU: the query heads of one key/value head are rows of one matrix product.

Queries go in blocks of positions against the keys up to the block's end, so little of what is hidden is computed. The
probabilities are kept for the backward pass, about S^2 / 2 a head; up to some thousand positions this beats torch's
fused kernel on CPU (benchmarks/RESULTS.md), longer sequences belong to `flash`.

Legend: B batch, H query heads, G key/value heads, S sequence, P width of a head, N = B * G, R rows of a block: H / G
heads times its c positions, K keys up to its end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.attention import flash
from moe_dist.kernels.attention.pattern import Pattern

_BLOCK = {torch.float32: 64}  # positions; 128 in other precisions


def attend(
    q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, pattern: Pattern | None = None, scale: float | None = None
) -> Tensor:
    """As reference.attend. What is not plain causal attention of a whole sequence is left to flash.attend."""
    pattern = pattern or Pattern()
    if not pattern.plain(q_BHSP.shape[2], k_BGSP.shape[2]):
        return flash.attend(q_BHSP, k_BGSP, v_BGSP, pattern, scale)
    return _PackedAttention.apply(q_BHSP, k_BGSP, v_BGSP, q_BHSP.shape[-1] ** -0.5 if scale is None else scale)


class _PackedAttention(torch.autograd.Function):
    """Queries go in blocks of positions, each block of all its heads against the keys up to its end."""

    @staticmethod
    def forward(ctx: Any, q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, scale: float) -> Tensor:
        length, width = q_BHSP.shape[2:]
        k_NSP, v_NSP = (t.reshape(-1, length, width) for t in (k_BGSP, v_BGSP))
        q_NHSP = q_BHSP.reshape(len(k_NSP), -1, length, width)
        out_NHSP, all_probs = torch.empty_like(q_NHSP, memory_format=torch.contiguous_format), []
        for start, stop in blocks(length, q_BHSP.dtype):
            q_NRP = q_NHSP[:, :, start:stop].flatten(1, 2)
            scores_NRK = torch.bmm(q_NRP, k_NSP[:, :stop].mT).mul_(scale)
            newest_NHcc = scores_NRK.unflatten(1, (-1, stop - start))[..., start:]
            newest_NHcc += newest_NHcc.new_full((stop - start,) * 2, float("-inf")).triu_(1)
            probs_NRK = scores_NRK.softmax(-1)
            out_NHSP[:, :, start:stop] = torch.bmm(probs_NRK, v_NSP[:, :stop]).unflatten(1, (-1, stop - start))
            all_probs.append(probs_NRK)
        ctx.save_for_backward(q_NHSP, k_NSP, v_NSP, *all_probs)
        ctx.shapes, ctx.scale = (q_BHSP.shape, k_BGSP.shape), scale
        return out_NHSP.view(q_BHSP.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSP: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NHSP, k_NSP, v_NSP, *all_probs = ctx.saved_tensors
        grad_NHSP = grad_BHSP.reshape(q_NHSP.shape)
        grad_q_NHSP, grad_k_NSP, grad_v_NSP = (
            torch.empty_like(q_NHSP, memory_format=torch.contiguous_format),
            torch.zeros_like(k_NSP),
            torch.zeros_like(v_NSP),
        )
        for (start, stop), probs_NRK in zip(blocks(q_NHSP.shape[2], q_NHSP.dtype), all_probs, strict=True):
            q_NRP, grad_NRP = (t[:, :, start:stop].flatten(1, 2) for t in (q_NHSP, grad_NHSP))
            grad_v_NSP[:, :stop].baddbmm_(probs_NRK.mT, grad_NRP)
            grad_probs_NRK = torch.bmm(grad_NRP, v_NSP[:, :stop].mT)
            grad_scores_NRK = torch._softmax_backward_data(grad_probs_NRK, probs_NRK, -1, probs_NRK.dtype)
            grad_q_NRP = torch.bmm(grad_scores_NRK, k_NSP[:, :stop]).mul_(ctx.scale)
            grad_q_NHSP[:, :, start:stop] = grad_q_NRP.unflatten(1, (-1, stop - start))
            grad_k_NSP[:, :stop].baddbmm_(grad_scores_NRK.mT, q_NRP, alpha=ctx.scale)
        of_q, of_kv = ctx.shapes
        return grad_q_NHSP.view(of_q), grad_k_NSP.view(of_kv), grad_v_NSP.view(of_kv), None


def blocks(length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """[start, stop) of equal blocks of positions: larger ones compute more of what is hidden, smaller ones make
    products too small to be fast."""
    count = max(-(-length // _BLOCK.get(dtype, 128)), 1)
    size = max(-(-length // count), 1)
    return [(start, min(start + size, length)) for start in range(0, length, size)]
