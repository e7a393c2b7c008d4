"""Cross-entropy of a vocabulary-parallel output projection, without ever holding all logits.

The projection and the loss are one operation over chunks of tokens: each chunk's logits are made, reduced to a loss and
turned into their own gradient while they are still in cache. Peak memory is one chunk of logits instead of three
[T, V] tensors. Under tp each rank holds V / tp columns; three small all-reduces per chunk join them
(Megatron-LM, arXiv 1909.08053, section 3).

Legend: T tokens, D d_model, V vocabulary on this rank, t tokens of one chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group

_CHUNK_LOGITS = 1 << 23


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tp: Group) -> Tensor:
    """Mean over tokens of -log softmax(x W^T)[target], in fp32 (float64 for float64 input); scalar.

    x_TD is replicated over tp, weight_VD is this rank's slice of the vocabulary, targets_T are global ids.
    """
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, tp)
    return token_losses(x_TD, weight_VD, targets_T, tp).mean()


@torch.no_grad()
def token_losses(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tp: Group) -> Tensor:
    """-log softmax(x W^T)[target] of every token, [T]. Not differentiable."""
    return torch.cat(
        [_chunk_losses(x_tD, weight_VD, t, tp).losses_t for x_tD, t in _chunks(x_TD, weight_VD, targets_T)]
    )


class _ChunkLosses(NamedTuple):
    """Probabilities are exp_tV / sum_t. columns_t: each target's column here, where held_t says that it is here."""

    losses_t: Tensor
    exp_tV: Tensor
    sum_t: Tensor
    columns_t: Tensor
    held_t: Tensor


def _chunks(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    tokens = chunk_tokens(weight_VD.shape[0])
    return list(zip(x_TD.split(tokens), targets_T.split(tokens), strict=True))


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk, where this rank has `vocabulary` columns of the logits."""
    return max(16, _CHUNK_LOGITS // vocabulary)


def _chunk_losses(x_tD: Tensor, weight_VD: Tensor, targets_t: Tensor, tp: Group) -> _ChunkLosses:
    logits_tV = x_tD @ weight_VD.t()
    if logits_tV.dtype in (torch.bfloat16, torch.float16):
        logits_tV = logits_tV.float()
    columns_t = targets_t - tp.rank * weight_VD.shape[0]
    held_t = (columns_t >= 0) & (columns_t < weight_VD.shape[0])
    columns_t = columns_t.clamp(0, weight_VD.shape[0] - 1)

    peak_t = all_reduce(logits_tV.amax(1), tp, dist.ReduceOp.MAX)
    logits_tV.sub_(peak_t[:, None])
    target_t = logits_tV.gather(1, columns_t[:, None])[:, 0].masked_fill(~held_t, 0.0)
    exp_tV = logits_tV.exp_()
    sum_t = exp_tV.sum(1)
    if tp.size > 1:
        both_2t = all_reduce(torch.stack((sum_t, target_t)), tp)
        sum_t, target_t = both_2t[0], both_2t[1]
    return _ChunkLosses(sum_t.log() - target_t, exp_tV, sum_t, columns_t, held_t)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, up to the scalar that backward brings."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, tp: Group) -> Tensor:
        grad_x_TD = torch.empty_like(x_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.promote_types(weight_VD.dtype, torch.float32))
        total = torch.zeros((), dtype=grad_weight_VD.dtype, device=x_TD.device)
        done, share = 0, 1.0 / x_TD.shape[0]
        for x_tD, targets_t in _chunks(x_TD, weight_VD, targets_T):
            losses_t, exp_tV, sum_t, columns_t, held_t = _chunk_losses(x_tD, weight_VD, targets_t, tp)
            # d loss / d logits = (probabilities - one_hot(target)) / T
            grad_tV = exp_tV.mul_(share / sum_t[:, None])
            grad_tV.scatter_add_(1, columns_t[:, None], held_t[:, None].to(grad_tV.dtype) * -share)
            grad_tV = grad_tV.to(x_TD.dtype)
            torch.mm(grad_tV, weight_VD, out=grad_x_TD[done : done + len(x_tD)])
            if grad_weight_VD.dtype == x_tD.dtype:
                grad_weight_VD.addmm_(grad_tV.t(), x_tD)
            else:
                grad_weight_VD.add_(grad_tV.t() @ x_tD)
            total += losses_t.sum()
            done += len(x_tD)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        return (grad_x_TD * grad).to(grad_x_TD.dtype), (grad_weight_VD * grad).to(ctx.weight_dtype), None, None
