"""The Mixture-of-Experts layer: route, cap, dispatch, compute, combine.

Legend: T tokens, D d_model, X rows that arrived at this rank, K assignments of a token.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe_dist.config.model import ModelConfig
from moe_dist.moe.capacity import Capacity, DispatchPlan
from moe_dist.moe.dispatch import make_dispatcher, split_over_etp
from moe_dist.moe.dispatch.overlap import overlapped
from moe_dist.moe.experts import Experts, expert_widths
from moe_dist.moe.losses import MoEStats, moe_stats
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.collectives import gather_from_group, split_to_group
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import StepContext


@dataclass
class Replay:
    """Keeps one layer's decisions from the forward pass for its recomputation, where a tie could fall the other way."""

    chosen_TK: Tensor | None = None
    plan: DispatchPlan | None = None


class MoE(nn.Module):
    """Sparse feed-forward of one block. x_TD: full tokens, or this tp rank's slice under sequence parallelism."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        mesh: Mesh,
        out_std: float | None = None,
    ) -> None:
        super().__init__()
        moe = model.moe
        widths = expert_widths(model)
        width = sum(widths) // len(widths)
        out_std = width**-0.5 if out_std is None else out_std
        self.config, self.layer = moe, layer
        self.model, self.mesh, self.out_std = model, mesh, out_std
        self.tp, self.etp = mesh.tp, mesh.etp
        self.router = ROUTERS[moe.router](model, layer, mesh)
        self.capacity = Capacity(moe, layer, mesh.token_ranks, index=(layer + 1) // moe.every - 1)
        self.dispatcher = make_dispatcher(moe, mesh, model.kernels)
        self.experts = Experts(model, mesh, out_std)
        self.shared = None
        if moe.num_shared_experts:
            width *= moe.num_shared_experts
            self.shared = FeedForward(model.d_model, width, model.activation, mesh, out_std)

    def forward(self, x_TD: Tensor, step: StepContext, replay: Replay | None = None) -> tuple[Tensor, MoEStats]:
        y_TD, stats = self._routed(self._own_tokens(x_TD), step, replay or Replay())
        y_TD = self._all_tokens(y_TD)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), stats

    def _routed(self, x_TD: Tensor, step: StepContext, replay: Replay) -> tuple[Tensor, MoEStats]:
        # 1. Who goes where, and who is let in.
        routing = self.router.route(x_TD, step, replay.chosen_TK)
        plan = self.capacity(routing, step) if replay.plan is None else replay.plan
        replay.chosen_TK, replay.plan = routing.experts_TK, plan
        weights_TK = routing.weights_TK
        if self.config.overflow == "reroute":
            weights_TK = self.router.weigh_again(routing, plan.experts_TK)
        # 2. There, through the experts, and back.
        finer, weights_TK = split_over_etp(plan, weights_TK, self.etp)
        if self.config.overlap_chunks > 1:
            y_TD, sent_bytes = overlapped(
                self.dispatcher, self.experts, x_TD, weights_TK, finer, self.config.overlap_chunks
            )
        else:
            arrival = self.dispatcher.dispatch(x_TD, weights_TK, finer)
            y_XD = self.experts(arrival.x_XD, arrival.weights_XK, arrival.order)
            y_TD = self.dispatcher.combine(y_XD, weights_TK, arrival)
            sent_bytes = arrival.sent_bytes
        # 3. What it cost, and what the router is told.
        return y_TD, moe_stats(self.config, self.layer, routing, plan, self.router, step, sent_bytes)

    def _own_tokens(self, x_TD: Tensor) -> Tensor:
        """Each tp rank dispatches its own slice, so that no token travels twice."""
        return x_TD if self.mesh.sequence_parallel else split_to_group(x_TD, self.tp)

    def _all_tokens(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.mesh.sequence_parallel else gather_from_group(y_TD, self.tp)
