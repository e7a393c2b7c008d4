"""The gate: who goes where, with which weight, and who is let in.

A router and the capacity rule, and what stands between them: experts that are closed, assignments that were sent to
another expert and are weighed again, and decisions that are repeated where a block is recomputed.

Legend: T tokens on this rank, D d_model, E experts, e open experts, K assignments of a token.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, DispatchPlan, Routing
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import Site, StepContext


@dataclass
class Replay:
    """Keeps one layer's decisions from the forward pass for its recomputation, where a tie could fall the other way."""

    chosen_TK: Tensor | None = None
    plan: DispatchPlan | None = None


class Gate:
    """Of one layer. It is no module, so that the router's parameters are the layer's: `layer.router = gate.router`."""

    def __init__(
        self,
        moe: MoEConfig,
        d_model: int,
        layer: int,
        mesh: Mesh,
        kernels: str = "torch",
        kind: Literal["feed_forward", "attention"] = "feed_forward",
    ) -> None:
        site = Site(layer, kind)
        self.router = ROUTERS[moe.router](moe, d_model, site, mesh, kernels)
        self.capacity = Capacity(moe, site, mesh.token_ranks)

    def __call__(self, x_TD: Tensor, step: StepContext, replay: Replay | None = None) -> Choice:
        """Every rank must call. `replay` repeats the decisions that it holds, or is given those taken now."""
        replay = replay or Replay()
        routing = self.routing(x_TD, step, replay.chosen_TK)
        plan = self.capacity(routing, step) if replay.plan is None else replay.plan
        replay.chosen_TK, replay.plan = routing.experts_TK, plan
        return Choice(routing, plan, self._weights(routing, plan))

    def routing(self, x_TD: Tensor, step: StepContext, chosen_TK: Tensor | None = None) -> Routing:
        """What the router says where closed experts do not exist: not for probabilities, noise nor losses.

        So closing an expert is a logit of -inf, and to the bit what a layer without that expert does: the router of the
        open experts is asked, and its answer is numbered among all.
        """
        open_e = self.router.open_ids()
        if open_e is None:
            return self.router(x_TD, step, chosen_TK)
        if chosen_TK is not None:
            chosen_TK = self._place_E(open_e)[chosen_TK]
        routing = self.router.of_open(open_e, x_TD, step, chosen_TK)
        return among_all(routing, open_e, len(self.router.open_E))

    def _weights(self, routing: Routing, plan: DispatchPlan) -> Tensor:
        """The router's, or those of the experts that assignments were rerouted to."""
        if self.router.moe.overflow != "reroute":
            return routing.weights_TK
        logits_TE, experts_TK = routing.logits_TE, plan.experts_TK
        if routing.open_e is not None:
            logits_TE, experts_TK = logits_TE[:, routing.open_e], self._place_E(routing.open_e)[experts_TK]
        return self.router.weigh_again(routing.weights_TK, logits_TE, experts_TK)

    def _place_E(self, open_e: Tensor) -> Tensor:
        """The place of each expert among the open ones: of 5 experts with 1, 2 and 4 open, [0, 0, 1, 0, 2]."""
        places = torch.arange(len(open_e), device=open_e.device)
        return places.new_zeros(len(self.router.open_E)).index_copy(0, open_e, places)


def among_all(routing: Routing, open_e: Tensor, num_experts: int) -> Routing:
    """From numbers among the open experts to numbers among all; closed ones have no tokens and logits of -inf."""

    def widen(values_XE: Tensor, fill: float) -> Tensor:
        return values_XE.new_full((len(values_XE), num_experts), fill).index_copy(1, open_e, values_XE)

    preference_TE, needs_EB, experts_TK = routing.preference_TE, routing.needs_EB, open_e[routing.experts_TK]
    if needs_EB is not None:
        needs_EB = needs_EB.new_zeros(num_experts, needs_EB.shape[1]).index_copy(0, open_e, needs_EB)
    stats = replace(
        routing.stats,
        experts_TK=experts_TK,
        counts_QE=widen(routing.stats.counts_QE, 0),
        prob_sums_QE=widen(routing.stats.prob_sums_QE, 0.0),
    )
    return replace(
        routing,
        experts_TK=experts_TK,
        logits_TE=widen(routing.logits_TE, -torch.inf),
        preference_TE=None if preference_TE is None else widen(preference_TE, -torch.inf),
        stats=stats,
        open_e=open_e,
        needs_EB=needs_EB,
    )
