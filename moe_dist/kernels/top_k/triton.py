"""The top k experts in one pass over the logits: scores, top-k, counts by chunk and the sums that the losses need.

The kernel cuts each chunk into blocks of tokens, and a block writes its own partial sums, which torch then adds: no
atomics, so the same bits on every run. The backward pass computes the scores again from the logits. All in fp32, also
for bfloat16 logits: scores and sums are fp32, the gradient has the dtype of the logits.

Legend: T tokens, E experts (inside kernels: the next power of two), K top_k, Q chunks, B tokens of a block, P programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.launch import check_launch
from moe_dist.kernels.top_k.reference import Score, TopK

MAX_EXPERTS = 1024
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal fp32: sigmoids can all be zero
_TILE = 2048  # logits of a block: 16 a thread, whose 64-bit keys must fit into registers too


def top_k_experts(
    logits_TE: Tensor,
    top_k: int,
    score: Score = "softmax",
    chosen_TK: Tensor | None = None,
    chunk: int | None = None,
    first: int = 0,
) -> TopK:
    """As `top_k_experts` in reference.py, for up to 1024 experts."""
    check_launch("top_k_experts", _forward, logits_TE)
    if logits_TE.shape[1] > MAX_EXPERTS:
        raise ValueError(
            f"top_k_experts: the Triton kernel holds a token's {logits_TE.shape[1]} logits in registers and takes up "
            f"to {MAX_EXPERTS}: use kernels=torch"
        )
    experts_TK, *rest = _TopK.apply(logits_TE, top_k, score, chosen_TK, chunk, first)
    return TopK(experts_TK if chosen_TK is None else chosen_TK, *rest)


class _Cut(NamedTuple):
    """How tokens are cut: chunks of `chunk` tokens, the first one `shift` tokens in; each of `blocks` blocks."""

    chunks: int
    chunk: int
    shift: int
    blocks: int
    block: int

    @staticmethod
    def of(tokens: int, padded_experts: int, chunk: int | None, first: int) -> "_Cut":
        if chunk is None:
            chunk, first = max(tokens, 1), 0
        chunks = (first + max(tokens, 1) - 1) // chunk - first // chunk + 1
        block = min(max(_TILE // padded_experts, 1), 128, triton.next_power_of_2(chunk))
        return _Cut(chunks, chunk, first % chunk, triton.cdiv(chunk, block), block)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        top_k: int,
        score: Score,
        chosen_TK: Tensor | None,
        chunk: int | None,
        first: int,
    ) -> tuple[Tensor | None, ...]:
        logits_TE = logits_TE.contiguous()
        tokens, num_experts = logits_TE.shape
        assert chosen_TK is not None or top_k <= num_experts, f"{top_k=} of {num_experts=}"
        top_k = top_k if chosen_TK is None else chosen_TK.shape[1]
        padded = triton.next_power_of_2(num_experts)
        cut = _Cut.of(tokens, padded, chunk, first)
        programs = cut.chunks * cut.blocks

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=logits_TE.device)

        given = None if chosen_TK is None else chosen_TK.contiguous()
        experts_TK = new(tokens, top_k, dtype=torch.int64) if given is None else given
        scores_TK = new(tokens, top_k)
        counts_PE, prob_sums_PE = new(programs, num_experts, dtype=torch.int32), new(programs, num_experts)
        z_P, entropy_P = new(programs), new(programs)
        _forward[(programs,)](
            *(logits_TE, given, experts_TK, scores_TK, counts_PE, prob_sums_PE, z_P, entropy_P),
            *(tokens, cut.chunk, cut.shift, cut.blocks),
            SIGMOID=score == "sigmoid",
            E=num_experts,
            E_PAD=padded,
            K=top_k,
            K_PAD=triton.next_power_of_2(top_k),
            BLOCK=cut.block,
        )
        shape = (cut.chunks, cut.blocks, num_experts)
        counts_QE, prob_sums_QE = counts_PE.view(shape).sum(1), prob_sums_PE.view(shape).sum(1)
        entropy_sum = entropy_P.sum()
        ctx.save_for_backward(logits_TE, experts_TK)
        ctx.cut, ctx.sigmoid = cut, score == "sigmoid"
        chosen = experts_TK if given is None else None
        ctx.mark_non_differentiable(*(counts_QE, entropy_sum), *(() if chosen is None else (chosen,)))
        return chosen, scores_TK, counts_QE, prob_sums_QE, z_P.sum(), entropy_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_scores_TK, _, grad_prob_sums_QE, grad_z, _ = grads
        logits_TE, experts_TK = ctx.saved_tensors
        cut, (tokens, num_experts) = ctx.cut, logits_TE.shape
        grad_logits_TE = torch.empty_like(logits_TE)
        _backward[(cut.chunks * cut.blocks,)](
            *(logits_TE, experts_TK, grad_scores_TK.contiguous(), grad_prob_sums_QE.contiguous(), grad_z),
            *(grad_logits_TE, tokens, cut.chunk, cut.shift, cut.blocks),
            SIGMOID=ctx.sigmoid,
            E=num_experts,
            E_PAD=triton.next_power_of_2(num_experts),
            K=experts_TK.shape[1],
            BLOCK=cut.block,
        )
        return grad_logits_TE, None, None, None, None, None


@triton.jit
def _tile(
    logits_ptr: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    shift: tl.tensor,
    blocks: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """(token_B, which of them are real, logits_BE). Padded experts are -inf; tokens that are not real are all 0."""
    program = tl.program_id(0)
    begin = program // blocks * chunk - shift
    token_B = begin + program % blocks * BLOCK + tl.arange(0, BLOCK)
    real_B = (token_B >= 0) & (token_B < tokens) & (token_B < begin + chunk)
    token_B = token_B.to(tl.int64)
    expert_E = tl.arange(0, E_PAD)
    logits_BE = tl.load(
        logits_ptr + token_B[:, None] * E + expert_E[None, :], mask=real_B[:, None] & (expert_E < E)[None, :], other=0.0
    ).to(tl.float32)
    return token_B, real_B, tl.where((expert_E < E)[None, :], logits_BE, float("-inf"))


@triton.jit
def _softmax(logits_BE: tl.tensor) -> Any:
    """(softmax, logsumexp) over the last dim."""
    max_B = tl.max(logits_BE, 1)
    exp_BE = tl.exp(logits_BE - max_B[:, None])
    sum_B = tl.sum(exp_BE, 1)
    return exp_BE / sum_B[:, None], max_B + tl.log(sum_B)


@triton.jit
def _sort_keys(by_BE: tl.tensor, E: tl.constexpr, E_PAD: tl.constexpr) -> Any:
    """int64 keys, all different: a larger one is a larger value or, of equal values, a lower expert.

    The bits of a float, negative ones flipped, are integers in the same order. The lowest bits hold the expert, so that
    one maximum finds value and expert, and always a real expert, also among NaN.
    """
    expert_E = tl.arange(0, E_PAD)
    bits_BE = by_BE.to(tl.int32, bitcast=True)
    ordered_BE = (bits_BE ^ ((bits_BE >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys_BE = ordered_BE * E_PAD + (E_PAD - 1 - expert_E)[None, :]
    return tl.where((expert_E < E)[None, :], keys_BE, -(1 << 62))


@triton.jit
def _forward(
    logits_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    prob_sums_ptr: tl.tensor,
    z_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    shift: tl.tensor,
    blocks: tl.tensor,
    SIGMOID: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # 1. Scores and probabilities.
    token_B, real_B, logits_BE = _tile(logits_ptr, tokens, chunk, shift, blocks, E, E_PAD, BLOCK)
    expert_E, place_K = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    probs_BE, lse_B = _softmax(logits_BE)
    scores_BE = probs_BE
    if SIGMOID:
        scores_BE = 1.0 / (1.0 + tl.exp(-logits_BE))
        probs_BE = scores_BE / tl.maximum(tl.sum(scores_BE, 1), TINY)[:, None]

    # 2. What the losses need of this block.
    out_E = tl.program_id(0).to(tl.int64) * E + expert_E
    sums_E = tl.sum(tl.where(real_B[:, None], probs_BE, 0.0), 0)
    tl.store(prob_sums_ptr + out_E, sums_E, mask=expert_E < E)
    tl.store(z_ptr + tl.program_id(0), tl.sum(tl.where(real_B, lse_B * lse_B, 0.0), 0))
    entropy_BE = -probs_BE * tl.log(tl.where(probs_BE == 0.0, 1.0, probs_BE))
    tl.store(entropy_ptr + tl.program_id(0), tl.sum(tl.where(real_B, tl.sum(entropy_BE, 1), 0.0), 0))

    # 3. The best expert, K times; or those given.
    keys_BE = _sort_keys(scores_BE, E, E_PAD)
    counts_E = tl.zeros([E_PAD], tl.int32)
    experts_BK = tl.zeros([BLOCK, K_PAD], tl.int64)
    scores_BK = tl.zeros([BLOCK, K_PAD], tl.float32)
    for k in range(K):
        if chosen_ptr is None:
            expert_B = E_PAD - 1 - (tl.max(keys_BE, 1) & (E_PAD - 1))
        else:
            expert_B = tl.load(chosen_ptr + token_B * K + k, mask=real_B, other=0).to(tl.int64)
        hit_BE = expert_E[None, :] == expert_B[:, None]
        keys_BE = tl.where(hit_BE, -(1 << 62), keys_BE)
        counts_E += tl.sum((hit_BE & real_B[:, None]).to(tl.int32), 0)
        score_B = tl.sum(tl.where(hit_BE, scores_BE, 0.0), 1)
        scores_BK = tl.where(place_K[None, :] == k, score_B[:, None], scores_BK)
        experts_BK = tl.where(place_K[None, :] == k, expert_B[:, None], experts_BK)

    tl.store(counts_ptr + out_E, counts_E, mask=expert_E < E)
    out_BK = token_B[:, None] * K + place_K[None, :]
    mask_BK = real_B[:, None] & (place_K < K)[None, :]
    tl.store(scores_ptr + out_BK, scores_BK, mask=mask_BK)
    if chosen_ptr is None:
        tl.store(experts_ptr + out_BK, experts_BK, mask=mask_BK)


@triton.jit
def _backward(
    logits_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    grad_scores_ptr: tl.tensor,
    grad_prob_sums_ptr: tl.tensor,
    grad_z_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    tokens: tl.tensor,
    chunk: tl.tensor,
    shift: tl.tensor,
    blocks: tl.tensor,
    SIGMOID: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """With p the softmax, s the scores and q = s / sum(s), and a, b the gradients of s and q (of p, if softmax):

    softmax: p (a + b - <p, a + b>);  sigmoid: s (1 - s) (a + (b - <q, b>) / sum(s));  both + 2 grad_z logsumexp p.
    """
    token_B, real_B, logits_BE = _tile(logits_ptr, tokens, chunk, shift, blocks, E, E_PAD, BLOCK)
    expert_E = tl.arange(0, E_PAD)
    softmax_BE, lse_B = _softmax(logits_BE)
    grad_scores_BE = tl.zeros([BLOCK, E_PAD], tl.float32)
    for k in range(K):
        expert_B = tl.load(experts_ptr + token_B * K + k, mask=real_B, other=0)
        grad_B = tl.load(grad_scores_ptr + token_B * K + k, mask=real_B, other=0.0)
        grad_scores_BE += tl.where(expert_E[None, :] == expert_B[:, None], grad_B[:, None], 0.0)
    of_chunk = (tl.program_id(0) // blocks).to(tl.int64) * E
    grad_probs_E = tl.load(grad_prob_sums_ptr + of_chunk + expert_E, mask=expert_E < E, other=0.0)

    if SIGMOID:
        scores_BE = 1.0 / (1.0 + tl.exp(-logits_BE))
        sum_B = tl.maximum(tl.sum(scores_BE, 1), TINY)
        mean_B = tl.sum(scores_BE * grad_probs_E[None, :], 1) / sum_B
        grad_scores_BE += (grad_probs_E[None, :] - mean_B[:, None]) / sum_B[:, None]
        grad_BE = grad_scores_BE * scores_BE * (1.0 - scores_BE)
    else:
        grad_scores_BE += grad_probs_E[None, :]
        mean_B = tl.sum(softmax_BE * grad_scores_BE, 1)
        grad_BE = softmax_BE * (grad_scores_BE - mean_B[:, None])
    grad_BE += (2.0 * tl.load(grad_z_ptr) * lse_B)[:, None] * softmax_BE
    out_BE = token_B[:, None] * E + expert_E[None, :]
    tl.store(grad_logits_ptr + out_BE, grad_BE, mask=real_B[:, None] & (expert_E < E)[None, :])
