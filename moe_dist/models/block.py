"""One decoder block: pre-norm attention and a pre-norm dense or MoE feed-forward, on residuals.

| block          | y =                                      | norms                | published in            |
|----------------|------------------------------------------|----------------------|-------------------------|
| sequential     | h + F(norm(h)),  h = x + A(norm(x))      | of both              | GPT-2, Llama            |
| parallel       | x + A(n) + F(n),  n = norm(x)            | of attention alone   | GPT-J, Falcon 7B        |
| parallel_norms | x + A(norm(x)) + F(norm'(x))             | of both              | GPT-NeoX, Falcon 40B    |

A is attention and F the feed-forward. Both enter and leave a tensor-parallel region of their own in every kind, so the
parallel ones exchange as often as the sequential one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.positions import Positions
from moe_dist.attention.routed import RoutedSelfAttention
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.model import ModelConfig
from moe_dist.moe.experts import expert_widths
from moe_dist.moe.gate import Replay
from moe_dist.moe.layer import MoE
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.norm import LayerNorm, RMSNorm, block_norm
from moe_dist.step import StepContext


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Whether block number `layer` is MoE."""
    return layer in model.moe.layers(model.num_layers)


def moe_layer(model: ModelConfig, layer: int, mesh: Mesh, out_std: float | None = None) -> MoE:
    """The MoE layer of block number `layer` as `model` says; out_std as for MoE."""
    return MoE(
        model.moe,
        model.d_model,
        model.d_ff,
        model.activation,
        layer=layer,
        mesh=mesh,
        kernels=model.kernels,
        recompute=model.recompute == "activation",
        out_std=out_std,
    )


def norm_of(model: ModelConfig, mesh: Mesh) -> RMSNorm | LayerNorm:
    """One of the residual stream, as `model` says."""
    return block_norm(model.norm, model.d_model, model.norm_eps, mesh, model.norms_by)


Attention = CausalSelfAttention | SwitchAttention | RoutedSelfAttention


def _multi_query(model: ModelConfig, layer: int, mesh: Mesh, out_std: float) -> Attention:
    return CausalSelfAttention(model.head_sizes, model.attention, mesh, layer, model.norm_eps, out_std, model.norms_by)


def _switch(model: ModelConfig, layer: int, mesh: Mesh, out_std: float) -> Attention:
    return SwitchAttention(model.head_sizes, model.attention, mesh, layer, model.kernels, out_std)


def _routed(model: ModelConfig, layer: int, mesh: Mesh, out_std: float) -> Attention:
    return RoutedSelfAttention(model.head_sizes, model.attention, mesh, layer, model.kernels, out_std)


# The attention of block number `layer`, by the word of the configuration.
ATTENTIONS: dict[str, Callable[[ModelConfig, int, Mesh, float], Attention]] = {
    "multi_query": _multi_query,
    "switch": _switch,
    "routed": _routed,
}


@dataclass
class BlockReplay:
    """The decisions of a block's routers, for its recomputation."""

    attention: Replay = field(default_factory=Replay)
    feed_forward: Replay = field(default_factory=Replay)


class DecoderBlock(nn.Module):
    """x_TD -> x_TD. Output projections start smaller by 1 / sqrt(2 num_layers), as in GPT-2."""

    def __init__(self, model: ModelConfig, layer: int, mesh: Mesh) -> None:
        super().__init__()
        residual = (2 * model.num_layers) ** -0.5
        self.kind, self.multiplier = model.block, model.residual_multiplier
        widths = expert_widths(model.moe, model.d_ff) if is_moe_layer(model, layer) else (model.d_ff,)
        self.attention_norm = norm_of(model, mesh)
        attention_std = model.head_sizes.width**-0.5 * residual
        self.attention = ATTENTIONS[model.attention.kind](model, layer, mesh, attention_std)
        self.feed_forward_norm = None if model.block == "parallel" else norm_of(model, mesh)
        out_std = (sum(widths) / len(widths)) ** -0.5 * residual
        if is_moe_layer(model, layer):
            self.feed_forward: nn.Module = moe_layer(model, layer, mesh, out_std)
        else:
            self.feed_forward = FeedForward(model.d_model, model.d_ff, model.activation, mesh, out_std, model.ff_bias)

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        positions: Positions,
        step: StepContext,
        cache: KVCache | None = None,
        replay: BlockReplay | None = None,
    ) -> tuple[Tensor, tuple[MoEStats, ...]]:
        """Stats of the routed layers of the block, attention before feed-forward."""
        replay = replay or BlockReplay()
        normed_TD, of_experts = self.attention_norm(x_TD), None
        a_TD, of_attention = self.attention(normed_TD, shape, positions, step, cache, replay.attention)
        if self.kind == "sequential":
            x_TD = x_TD + self._scaled(a_TD)
        if self.feed_forward_norm is not None:
            normed_TD = self.feed_forward_norm(x_TD)
        if isinstance(self.feed_forward, MoE):
            y_TD, of_experts = self.feed_forward(normed_TD, step, replay.feed_forward)
        else:
            y_TD = self.feed_forward(normed_TD)
        if self.kind != "sequential":
            y_TD = a_TD + y_TD
        return x_TD + self._scaled(y_TD), tuple(stats for stats in (of_attention, of_experts) if stats is not None)

    def _scaled(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.multiplier == 1.0 else y_TD * self.multiplier
