"""Auxiliary losses of the router and the statistics of one layer; pure functions, returned and never stored.

Legend: T tokens on this rank, E experts, W ranks of the world.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.schema import MoEConfig
from moe_dist.moe.capacity import DispatchPlan
from moe_dist.moe.routing import Routing


@dataclass(frozen=True)
class MoEStats:
    """aux_loss carries the gradient, already weighted and divided by tp; the rest is for reporting.

    balance_loss, z_loss and entropy (nats) are means over this rank's tokens: their mean over ranks is the mean over
    the micro-step. load_E (assignments before dropping), kept_E and crossing (kept assignments whose expert another
    rank holds, a scalar) are sums over the whole micro-step.
    """

    layer: int
    aux_loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    entropy: Tensor
    load_E: Tensor
    kept_E: Tensor
    crossing: Tensor


def balance_loss(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i (Switch Transformers, arXiv 2101.03961, eq. 4 to 6).

    f_i: share of all assignments, before dropping, that chose expert i, over the whole micro-step (global-batch
    balancing, arXiv 2501.11873); P_i: mean probability over this rank's tokens. Linear in P, so the mean of this over
    ranks is the loss of the micro-step. Perfect balance scores 1, collapse on one expert E.
    """
    share_E = load_E / load_E.sum()
    return probs_TE.shape[1] * (share_E.to(probs_TE.dtype) * probs_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906, eq. 5): keeps router logits small."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def router_entropy(probs_TE: Tensor) -> Tensor:
    """Mean entropy of a token's distribution over experts, in nats."""
    return torch.special.entr(probs_TE).sum(-1).mean()


def crossing_rows(kept_WE: Tensor, ep: int) -> Tensor:
    """Kept assignments that travel to another rank, over the whole world: 0 at ep = 1.

    An ep group is `ep` consecutive ranks, and its ith rank holds the ith part of the experts (parallel/mesh.py).
    """
    world, num_experts = kept_WE.shape
    from_to = kept_WE.view(world // ep, ep, ep, num_experts // ep).sum((0, 3))
    return from_to.sum() - from_to.trace()


def moe_stats(moe: MoEConfig, layer: int, routing: Routing, plan: DispatchPlan, tp: int, ep: int) -> MoEStats:
    """Losses and load of one layer. Each tp rank adds the share of its slice of the tokens: 1 / tp."""
    load_E, kept_E = plan.counts_WE.sum(0), plan.kept_WE.sum(0)
    balance, z = balance_loss(routing.probs_TE, load_E), z_loss(routing.logits_TE)
    aux = (moe.balance_loss_coef * balance + moe.z_loss_coef * z) / tp
    entropy, crossing = router_entropy(routing.probs_TE.detach()), crossing_rows(plan.kept_WE, ep)
    return MoEStats(layer, aux, balance.detach(), z.detach(), entropy, load_E, kept_E, crossing)
