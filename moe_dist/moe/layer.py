"""The Mixture-of-Experts layer: route, cap, dispatch, compute, combine.

Legend: T tokens, D d_model, R rows received by the local experts.
"""

from torch import Tensor, nn

from moe_dist.config.schema import ModelConfig
from moe_dist.moe.capacity import Capacity, DispatchPlan
from moe_dist.moe.dispatch import make_dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.feed_forward import FeedForward
from moe_dist.moe.losses import MoEStats, moe_stats
from moe_dist.moe.routing import SoftmaxRouter, StepContext
from moe_dist.parallel.collectives import gather_from_group, split_to_group
from moe_dist.parallel.mesh import Mesh


class Replay:
    """Keeps one layer's decisions from the forward pass for its recomputation, where a tie could fall the other way."""

    plan: DispatchPlan | None = None


class MoE(nn.Module):
    """Sparse feed-forward of one block. x_TD: full tokens, or this tp rank's slice under sequence parallelism."""

    def __init__(self, model: ModelConfig, layer: int, mesh: Mesh, sequence_parallel: bool, out_std: float) -> None:
        super().__init__()
        moe = model.moe
        d_ff = moe.d_ff or model.d_ff
        self.config, self.layer, self.sequence_parallel = moe, layer, sequence_parallel
        self.tp, self.ep = mesh.tp, mesh.ep
        self.router = SoftmaxRouter(model.d_model, moe.num_experts, moe.top_k, moe.renormalize, layer, mesh.tp)
        self.capacity = Capacity(moe, layer, mesh.world)
        self.dispatcher = make_dispatcher(moe.dispatch, moe.wire, mesh)
        self.experts = Experts(moe.num_experts, model.d_model, d_ff, model.activation, moe.experts, mesh, out_std)
        self.shared = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * d_ff
            self.shared = FeedForward(model.d_model, width, model.activation, mesh.tp, sequence_parallel, out_std)

    def forward(self, x_TD: Tensor, step: StepContext, replay: Replay | None = None) -> tuple[Tensor, MoEStats]:
        y_TD, stats = self._routed(self._own_tokens(x_TD), step, replay or Replay())
        y_TD = self._all_tokens(y_TD)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), stats

    def _routed(self, x_TD: Tensor, step: StepContext, replay: Replay) -> tuple[Tensor, MoEStats]:
        routing = self.router(x_TD, step, replay.plan and replay.plan.experts_TK)
        plan = replay.plan = replay.plan or self.capacity(routing, step)
        rows_RD, trip = self.dispatcher.dispatch(x_TD, plan)
        rows_RD = self.experts(rows_RD, trip.rows_per_expert)
        y_TD = self.dispatcher.combine(rows_RD, routing.weights_TK, trip)
        return y_TD, moe_stats(self.config, self.layer, routing, plan, self.tp.size, self.ep.size)

    def _own_tokens(self, x_TD: Tensor) -> Tensor:
        """Each tp rank dispatches its own slice, so that no token travels twice."""
        return x_TD if self.sequence_parallel else split_to_group(x_TD, self.tp)

    def _all_tokens(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.sequence_parallel else gather_from_group(y_TD, self.tp)
