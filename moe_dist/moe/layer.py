"""The Mixture-of-Experts layer: who goes where, there and back, and what it cost.

    y = sum over the chosen experts i of w_i(x) E_i(x)
        + shared(x), or sigmoid(x W_g^T) shared(x) (Qwen2-MoE)
        + b, if asked for (JetMoE)

Legend: T tokens, D d_model.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model import MoEConfig
from moe_dist.moe.dispatch import make_dispatcher
from moe_dist.moe.experts import Experts, shared_width
from moe_dist.moe.gate import Gate, Replay
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.linear import SharedBias, TokenSlices
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter
from moe_dist.step import StepContext


class MoE(nn.Module):
    """Sparse feed-forward of block number `layer`. x_TD: full tokens, or this tp rank's slice under sequence
    parallelism.

    d_ff: width of an expert where `moe` gives none. recompute: experts activate again in the backward pass. out_std: of
    the initial output projections; None is 1 / sqrt(mean width of the experts).
    """

    def __init__(
        self,
        moe: MoEConfig,
        d_model: int,
        d_ff: int,
        activation: str,
        *,
        layer: int,
        mesh: Mesh,
        kernels: str = "torch",
        recompute: bool = False,
        out_std: float | None = None,
    ) -> None:
        super().__init__()
        self.config = moe
        self.layer = layer
        self.mesh = mesh
        self.d_ff = d_ff
        self.slices = TokenSlices(mesh)
        self.gate = Gate(moe, d_model, layer, mesh, kernels)
        self.router = self.gate.router
        self.dispatcher = make_dispatcher(moe, mesh, kernels)
        self.experts = Experts(moe, d_model, d_ff, activation, mesh, kernels, recompute, out_std)
        self.shared = None
        if moe.num_shared_experts:
            self.shared = FeedForward(d_model, shared_width(moe, d_ff), activation, mesh, self.experts.out_std)
        self.out_bias = SharedBias(d_model, mesh) if moe.out_bias else None
        self.shared_gate = SharedGate(d_model, mesh) if moe.shared_gate else None

    def forward(self, x_TD: Tensor, step: StepContext, replay: Replay | None = None) -> tuple[Tensor, MoEStats]:
        """y_TD as x_TD, and what the layer did. Each tp rank sends its own slice, so no token travels twice."""
        y_TD, stats = self._routed(self.slices.own(x_TD), step, replay)
        y_TD = self.slices.all(y_TD)
        y_TD = y_TD if self.out_bias is None else self.out_bias(y_TD)
        return (y_TD if self.shared is None else y_TD + self._shared(self.shared, x_TD)), stats

    def _shared(self, shared: FeedForward, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = shared(x_TD)
        return y_TD if self.shared_gate is None else self.shared_gate(x_TD) * y_TD

    def _routed(self, x_TD: Tensor, step: StepContext, replay: Replay | None) -> tuple[Tensor, MoEStats]:
        choice = self.gate(x_TD, step, replay)  # who goes where, with which weight, and who is let in
        y_TD, sent_bytes = self.dispatcher.carry(x_TD, choice, self.experts)  # there, through the experts, and back
        return y_TD, MoEStats.of(choice, self.router, step, sent_bytes)  # losses and loads are returned, never stored


class SharedGate(nn.Module):
    """sigmoid(x W^T), W [1, D] the same on every rank: [T, D] -> [T, 1].

    Under sequence parallelism each rank sees a slice of the tokens, so the gradient of W is summed over tp.
    """

    def __init__(self, d_model: int, mesh: Mesh) -> None:
        super().__init__()
        self.slices = mesh.tp if mesh.sequence_parallel else Group()
        shape = (1, d_model)
        self.weight = parameter(shape, ParamSpec(shape, std=d_model**-0.5))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, copy_to_group(self.weight, self.slices)).sigmoid()
