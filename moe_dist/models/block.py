"""One decoder block: pre-norm attention, then a pre-norm dense or MoE feed-forward, each on a residual."""

from torch import Tensor, nn

from moe_dist.attention.mqa import CausalSelfAttention
from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.norm.layer import RMSNorm
from moe_dist.moe.experts import expert_widths
from moe_dist.moe.feed_forward import FeedForward
from moe_dist.moe.layer import MoE, Replay
from moe_dist.moe.losses import MoEStats
from moe_dist.moe.routing import StepContext
from moe_dist.parallel.mesh import Mesh


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """MoE on every nth layer: the nth, the 2nth, ..."""
    return model.moe.num_experts > 0 and (layer + 1) % model.moe.every == 0


class DecoderBlock(nn.Module):
    """x_TD -> x_TD. Output projections start smaller by 1 / sqrt(2 num_layers), as in GPT-2."""

    def __init__(self, model: ModelConfig, layer: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__()
        tp, residual = mesh.tp, (2 * model.num_layers) ** -0.5
        widths = expert_widths(model) if is_moe_layer(model, layer) else (model.d_ff,)
        width = model.num_heads * (model.head_dim or model.d_model // model.num_heads)
        self.attention_norm = RMSNorm(model.d_model, model.norm_eps, tp, sequence_parallel, model.kernels)
        self.attention = CausalSelfAttention(model, tp, sequence_parallel, width**-0.5 * residual)
        self.feed_forward_norm = RMSNorm(model.d_model, model.norm_eps, tp, sequence_parallel, model.kernels)
        out_std = (sum(widths) / len(widths)) ** -0.5 * residual
        if is_moe_layer(model, layer):
            self.feed_forward: nn.Module = MoE(model, layer, mesh, sequence_parallel, out_std)
        else:
            self.feed_forward = FeedForward(model.d_model, model.d_ff, model.activation, tp, sequence_parallel, out_std)

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        rotary: tuple[Tensor, Tensor],
        step: StepContext,
        replay: Replay | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), shape, rotary)
        normed_TD = self.feed_forward_norm(x_TD)
        if isinstance(self.feed_forward, MoE):
            y_TD, stats = self.feed_forward(normed_TD, step, replay)
            return x_TD + y_TD, stats
        return x_TD + self.feed_forward(normed_TD), None
