"""The auxiliary losses of a router and the statistics of its layer; returned, never stored.

Legend: T tokens on this rank, E experts, Q chunks of tokens that are balanced each on its own, W ranks of the world,
P pools of experts, S places of a sequence, M places of the micro-step, F classes of tokens by their frequency.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.moe.balance import Tally
from moe_dist.moe.choice import Choice
from moe_dist.moe.drops import drops_of
from moe_dist.moe.router import Router
from moe_dist.parallel.collectives import all_reduce
from moe_dist.step import Site, StepContext


@dataclass(frozen=True)
class MoEStats:
    """What one layer did with one micro-step; from here to the record of the run.

    site: whose experts. aux_loss carries the gradient, already weighted and divided by tp; the rest is for reporting.
    balance_loss, z_loss and entropy (nats) are means over this rank's tokens: their mean over ranks is the mean over
    the micro-step. load_E (assignments before dropping) and kept_E are sums over the whole micro-step. unserved: share
    of this rank's tokens that no expert took. sent_bytes: what this rank sent to others in the forward pass.
    dropped_E, dropped_S, dropped_M, dropped_F: assignments of this rank's tokens that found no place, by expert, by
    place in the sequence and in the micro-step, by how frequent the token is; load_F: all of them by that (drops.py).
    over_P: rows asked for beyond the limit of each pool, over the whole micro-step. needs_EB: of
    this rank's tokens, for routers that ask for it (balance.py).
    """

    site: Site
    aux_loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    load_E: Tensor
    kept_E: Tensor
    unserved: Tensor
    dropped_E: Tensor
    dropped_S: Tensor
    dropped_M: Tensor
    dropped_F: Tensor
    load_F: Tensor
    over_P: Tensor
    sent_bytes: int = 0
    needs_EB: Tensor | None = None

    @property
    def tally(self) -> Tally:
        """What the router is told of it after the step."""
        return Tally(self.load_E, self.needs_EB)

    @staticmethod
    def of(choice: Choice, router: Router, step: StepContext, sent_bytes: int) -> "MoEStats":
        """Each tp rank adds the share of its slice of the tokens to the losses: 1 / tp.

        With padding, ranks have unequal numbers of tokens; sums are divided by the mean over ranks of those numbers.
        """
        moe, routing, plan, real = router.moe, choice.routing, choice.plan, step.real
        tokens = len(routing.experts_TK) if real is None else real.total / router.token_ranks.size
        tokens = tokens or 1
        counts_QE, prob_sums_QE = whole_chunks(choice, router, step), routing.stats.prob_sums_QE
        if routing.open_e is not None:  # a closed expert has no share in the balance
            prob_sums_QE, counts_QE = prob_sums_QE[:, routing.open_e], counts_QE[:, routing.open_e]
        balance = balance_loss(prob_sums_QE, counts_QE, tokens)
        # mean over tokens of logsumexp^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small
        z = routing.stats.z_sum / tokens
        aux = torch.zeros_like(z)
        if router.has_losses:
            weighted = moe.balance_loss_coef * balance if "loss" in moe.balanced_by else aux
            aux = weighted + moe.z_loss_coef * z
        if routing.extra_loss is not None:
            aux = aux + routing.extra_loss
        unserved_T = ~plan.kept_TK.any(1)
        unserved = (unserved_T if real is None else unserved_T & real.mask_T).sum() / tokens
        drops = drops_of(plan, real, step.marks_XT, by_experts=moe.router == "expert_choice")
        return MoEStats(
            site=router.site,
            aux_loss=aux / router.slices.size,
            balance_loss=balance.detach(),
            z_loss=z.detach(),
            entropy=routing.stats.entropy_sum / tokens,
            load_E=plan.counts_WE.sum(0),
            kept_E=plan.kept_WE.sum(0),
            unserved=unserved,
            **vars(drops),
            over_P=plan.over_P,
            sent_bytes=sent_bytes,
            needs_EB=routing.needs_EB,
        )


def balance_loss(prob_sums_QE: Tensor, counts_QE: Tensor, tokens: float) -> Tensor:
    """E * sum_i f_i P_i (Switch Transformers, arXiv 2101.03961, eq. 4 to 6), the mean over chunks of tokens.

    f_i: share of a chunk's assignments, before dropping, that chose expert i; P_i: the mean of its probabilities, here
    the sums over this rank's tokens. Linear in P, so the mean of this over ranks is the loss of the micro-step when
    counts_QE are those of whole chunks. Perfect balance scores 1, collapse on one expert E.
    """
    counts_QE = counts_QE.to(prob_sums_QE.dtype)  # integers would be divided in fp32
    share_QE = counts_QE / counts_QE.sum(1, keepdim=True).clamp(min=1)
    return prob_sums_QE.shape[1] * (share_QE * prob_sums_QE).sum() / (tokens or 1)


def whole_chunks(choice: Choice, router: Router, step: StepContext) -> Tensor:
    """Assignments by chunk and expert, counting every token of a chunk on whatever rank it is.

    global: one chunk, the micro-step (global-batch balancing, arXiv 2501.11873). sequence: one a sequence, which tp may
    cut (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20). local: one a rank (what Megatron and DeepSpeed do).
    """
    counts_QE, scope = choice.routing.stats.counts_QE, router.moe.balance_scope
    if scope == "global":
        return choice.plan.counts_WE.sum(0, keepdim=True)
    if scope == "sequence" and step.seq_len and router.slices.size > 1:
        tokens = len(choice.routing.experts_TK)
        first = router.slices.rank * tokens // step.seq_len
        whole = counts_QE.new_zeros(-(-router.slices.size * tokens // step.seq_len), counts_QE.shape[1])
        whole[first : first + len(counts_QE)] = counts_QE
        return all_reduce(whole, router.slices)[first : first + len(counts_QE)]
    return counts_QE
