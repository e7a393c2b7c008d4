"""How the loads of experts are kept level: `model.moe.balance`.

| balance  | what acts                                                               | when             |
|----------|-------------------------------------------------------------------------|------------------|
| loss     | the router's gradient of a loss on loads and probabilities (losses.py)  | every micro-step |
| sign     | a bias moves by a fixed rate, up where an expert has less than the mean | once a step      |
| quantile | a bias is set to what gives every expert its share of the step's tokens | once a step      |
| none     | nothing                                                                 |                  |

The loss goes together with either bias: `loss+sign`, `loss+quantile`. A bias is added to the scores for the choice
alone: weights are made of the scores without it, and it has no gradient. It is a buffer of the router, in checkpoints.

The sign rule is loss-free balancing (arXiv 2408.15664, algorithm 1). Quantile balancing (Su, kexue.fm/archives/11619;
Kimi K3 report, section 2.3.3 and appendices C and D; Megatron-LM's pull requests 5349 and 6802): with scores s in
[0, 1], k of E experts chosen, and the bias b by which the step was routed,

    alpha_t = the (k+1)-th best of s_t + b     what a token must beat
    n_te    = alpha_t - s_te                   the bias with which expert e would just get token t
    b_e     = the quantile k / E of n_te over the tokens t of the step, minus the mean over experts

b_e lies above k / E of the needs n_te, so the expert gets that share of the tokens. alpha is of the batch and uses the
old b, so one pass does not hit exactly; the passes of a few steps do. The quantile is read from a histogram of
`balance_bins` equal bins over [min b - 1, max b + 1], between whose edges it is interpolated: whole numbers, whose sum
over micro-steps and ranks is the same in any order. A bin should be small beside the scores. On 16,384 tokens with
normal logits, 8 of 256 experts, a softmax ends at a highest load of 1.5 times the mean with 1,000 bins and of 1.04 with
20,000, a sigmoid at 1.08 with 1,000.

It counts what routes for training and nothing else: not evaluation, not a block that is computed again, not padding,
not experts that are closed, and each token once (every tp rank routes a slice of its own).

Legend: T tokens on this rank, E experts, K top_k, B bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tally:
    """What a router is told once an optimizer step. load_E: assignments of all ranks, before dropping. needs_EB: int64,
    the histogram of this rank's tokens, or after a reduction of all; None where nobody reads it."""

    load_E: Tensor
    needs_EB: Tensor | None = None

    def __add__(self, other: "Tally") -> "Tally":
        needs_EB = self.needs_EB
        if needs_EB is not None and other.needs_EB is not None:
            needs_EB = needs_EB + other.needs_EB
        return Tally(self.load_E + other.load_E, needs_EB)


def reduced(parts: Sequence[Tensor], reduce: Callable[[Tensor], object]) -> list[Tensor]:
    """Each of `parts`, whose elements are of one type, after `reduce` has summed them over ranks in place, at once."""
    flat = torch.cat([part.flatten() for part in parts])
    reduce(flat)
    sizes = [part.numel() for part in parts]
    return [own.view_as(part) for own, part in zip(flat.split(sizes), parts, strict=True)]


def sign_step(load_E: Tensor, open_E: Tensor) -> Tensor:
    """1 for experts with less than the mean load, -1 for those with more; float64. Closed experts have no load: they
    neither lower the mean nor rise towards it."""
    takes_part_E = open_E.to(load_E.device, torch.float64)
    mean = (load_E * takes_part_E).sum() / takes_part_E.sum()
    return (mean - load_E).sign() * takes_part_E


def needs_histogram(
    preference_TE: Tensor, experts_TK: Tensor, bias_E: Tensor, bins: int, real_T: Tensor | None = None
) -> Tensor:
    """[E, B]: how many tokens need which bias, expert by expert. preference_TE: scores plus bias_E, by which experts_TK
    were chosen. real_T: true where a token is no padding. Where all experts are chosen none must be beaten: zeros."""
    num_experts, device = preference_TE.shape[1], preference_TE.device
    counts_N = torch.zeros(num_experts * bins, dtype=torch.int64, device=device)
    if experts_TK.shape[1] < num_experts:
        alpha_T1 = preference_TE.scatter(1, experts_TK, -torch.inf).amax(1, keepdim=True)
        needs_TE = alpha_T1 - preference_TE + bias_E
        low, width = _bins(bias_E.amin(), bias_E.amax(), bins)
        bin_TE = ((needs_TE - low) / width).long().clamp(0, bins - 1)
        bin_TE = bin_TE + bins * torch.arange(num_experts, device=device)
        once_TE = torch.ones_like(bin_TE) if real_T is None else real_T.long()[:, None].expand_as(bin_TE)
        counts_N = counts_N.scatter_add(0, bin_TE.flatten(), once_TE.flatten())
    return counts_N.view(num_experts, bins)


def quantile_bias(needs_EB: Tensor, bias_E: Tensor, open_E: Tensor, top_k: int, ema: float = 0.0) -> Tensor:
    """The new bias. needs_EB: of all ranks and micro-steps, made with bias_E. open_E: 1 for experts that take part; the
    others keep their bias. ema: share of the old bias in the new one. Without a token all keep theirs."""
    open_E = open_E.to(needs_EB.device) > 0
    old_E, bins = bias_E.double(), needs_EB.shape[1]
    low, width = _bins(old_E.where(open_E, torch.inf).amin(), old_E.where(open_E, -torch.inf).amax(), bins)
    # 1. The place of the quantile: in the first bin up to whose end there are `target` tokens, as far into it as that.
    below_EB = needs_EB.cumsum(1)
    target_E1 = below_EB[:, -1:] * (top_k / open_E.sum().double())
    bin_E1 = (below_EB < target_E1).sum(1, keepdim=True).clamp(max=bins - 1)
    inside_E1 = needs_EB.gather(1, bin_E1)
    into_E1 = 1 - (below_EB.gather(1, bin_E1) - target_E1) / inside_E1.clamp(min=1)
    quantile_E = (low + width * (bin_E1 + into_E1)).squeeze(1)
    # 2. A number that all experts have more changes no choice: the mean over the open ones is 0.
    new_E = ema * old_E + (1 - ema) * (quantile_E - _mean(quantile_E, open_E))
    new_E = new_E - _mean(new_E, open_E)
    return new_E.where(open_E & (below_EB[:, -1] > 0), old_E).to(bias_E.dtype)


def _bins(least: Tensor, most: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(start of the first bin, width of each): scores are in [0, 1], so needs are in [least - 1, most + 1]."""
    return least - 1, (most - least + 2) / bins


def _mean(values_E: Tensor, open_E: Tensor) -> Tensor:
    return values_E.where(open_E, 0.0).sum() / open_E.sum()
