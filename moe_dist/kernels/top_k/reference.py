"""From router logits to chosen experts, their scores, and everything the auxiliary losses need: one pass.

Legend: T tokens, E experts, K top_k, Q chunks of tokens over which the balancing loss is taken.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.kernels.permute.order import counts_of

Score = Literal["softmax", "sigmoid"]
_FEW = 4  # experts of a token up to which repeated argmax is faster than sorting


@dataclass(frozen=True)
class TopK:
    """experts_TK: int64, best first. scores_TK: the chosen experts' scores, differentiable. counts_QE: assignments by
    chunk, int64. prob_sums_QE: sum over a chunk's tokens of the probabilities, differentiable. z_sum: sum over tokens
    of logsumexp(logits)^2, differentiable. entropy_sum: nats, for reporting.

    Probabilities are softmax(logits), or sigmoid(logits) divided by their sum over experts.
    """

    experts_TK: Tensor
    scores_TK: Tensor
    counts_QE: Tensor
    prob_sums_QE: Tensor
    z_sum: Tensor
    entropy_sum: Tensor


def scores_of(logits_TE: Tensor, score: Score) -> Tensor:
    """softmax over experts, or sigmoid of each."""
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


def top_k_experts(
    logits_TE: Tensor,
    top_k: int,
    score: Score = "softmax",
    chosen_TK: Tensor | None = None,
    chunk: int | None = None,
    first: int = 0,
) -> TopK:
    """Choose the top_k experts by score, or take `chosen_TK` as given.

    A chunk is `chunk` consecutive tokens (None: all are one), counted from a token `first` places before the
    first here: token t is in chunk (first + t) // chunk - first // chunk. Equal scores: the lower expert first.
    """
    scores_TE = scores_of(logits_TE, score)
    if chosen_TK is None:
        pick = _best_of_finite if top_k <= _FEW else best
        chosen_TK = pick(scores_TE.detach(), top_k)
    probs_TE = scores_TE if score == "softmax" else shares(scores_TE)
    tokens, num_experts = logits_TE.shape
    chunk_T, chunks = chunks_of(tokens, chunk, first, logits_TE.device)
    prob_sums_QE = probs_TE.new_zeros(chunks, num_experts).index_add(0, chunk_T, probs_TE)
    cells_N = (chunk_T[:, None] * num_experts + chosen_TK).flatten()
    return TopK(
        experts_TK=chosen_TK,
        scores_TK=scores_TE.gather(1, chosen_TK),
        counts_QE=counts_of(cells_N, chunks * num_experts).view(chunks, num_experts),
        prob_sums_QE=prob_sums_QE,
        z_sum=logits_TE.logsumexp(-1).square().sum(),
        entropy_sum=torch.special.entr(probs_TE.detach()).sum(),
    )


def shares(scores_TE: Tensor) -> Tensor:
    """Divided by their sum; zero where all are zero, as sigmoids can be."""
    return scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)


def best(scores_TE: Tensor, top_k: int) -> Tensor:
    """The top_k experts of each token, best first; among equals the one with the lower number."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _best_of_finite(scores_TE: Tensor, top_k: int) -> Tensor:
    """`best` for few: the first of the largest, again and again. -inf marks what is taken, so it may not be a score."""
    chosen_TK = scores_TE.argmax(-1, keepdim=True)
    for _ in range(top_k - 1):
        left_TE = scores_TE.scatter(1, chosen_TK, float("-inf"))
        chosen_TK = torch.cat([chosen_TK, left_TE.argmax(-1, keepdim=True)], 1)
    return chosen_TK


def chunks_of(tokens: int, chunk: int | None, first: int, device: torch.device) -> tuple[Tensor, int]:
    """(chunk of each token, number of chunks)."""
    if chunk is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device), 1
    index_T = (torch.arange(tokens, device=device) + first) // chunk - first // chunk
    return index_T, (first + max(tokens, 1) - 1) // chunk - first // chunk + 1
