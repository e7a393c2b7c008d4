"""One encoder block: attention to the whole sequence, then a dense or MoE feed-forward, post-norm as in arXiv
1706.03762: x = norm(x + f(x)). Padding is neither attended to nor routed.

Legend: B batch, S sequence, T = B * S tokens, D d_model, H query heads, G key/value heads, P width of a head.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from moe_dist.attention.multi_query import KeyValueHeads
from moe_dist.config.model import HeadSizes, ModelConfig
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.attention.pattern import Pattern
from moe_dist.kernels.random import RandomKey, dropout_by_index
from moe_dist.models.block import is_moe_layer, moe_layer
from moe_dist.moe.experts import expert_widths
from moe_dist.moe.layer import MoE
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, enter, leave
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.norm import RMSNorm
from moe_dist.step import StepContext


class EncoderAttention(nn.Module):
    """Every token sees every token of its sequence that is no padding. x_TD -> y_TD."""

    def __init__(self, sizes: HeadSizes, backend: str, mesh: Mesh, out_std: float) -> None:
        super().__init__()
        self.mesh = mesh
        self.head_dim = sizes.head_dim
        self.query = ColumnParallelLinear(sizes.d_model, sizes.width, mesh.tp, sizes.d_model**-0.5)
        self.key_value = KeyValueHeads(sizes, mesh.tp)
        self.out = RowParallelLinear(sizes.width, sizes.d_model, mesh.tp, out_std)
        self.attend = attention(backend)

    def forward(self, x_TD: Tensor, mask_BS: Tensor) -> Tensor:
        shape = (mask_BS.shape[0], mask_BS.shape[1])
        x_TD = enter(x_TD, self.mesh)
        q_BHSP = self.query(x_TD).view(*shape, -1, self.head_dim).transpose(1, 2)
        k_BSGP, v_BSGP = self.key_value(x_TD, shape)
        pattern = Pattern(causal=False, keys_BS=mask_BS)
        y_BHSP = self.attend(q_BHSP, k_BSGP.transpose(1, 2), v_BSGP.transpose(1, 2), pattern, None)
        y_TD = self.out(y_BHSP.transpose(1, 2).reshape(x_TD.shape[0], -1))
        return leave(y_TD, self.mesh)


class EncoderBlock(nn.Module):
    """x_TD -> x_TD, and the statistics of its MoE layer if it has one."""

    def __init__(self, model: ModelConfig, layer: int, mesh: Mesh) -> None:
        super().__init__()
        residual, sparse = (2 * model.num_layers) ** -0.5, is_moe_layer(model, layer)
        widths = expert_widths(model.moe, model.d_ff) if sparse else (model.d_ff,)
        out_std = (sum(widths) / len(widths)) ** -0.5 * residual
        self.attention = EncoderAttention(
            model.head_sizes, model.attention.backend, mesh, model.head_sizes.width**-0.5 * residual
        )
        self.attention_norm = RMSNorm(model.d_model, model.norm_eps, mesh, model.norms_by)
        if sparse:
            self.feed_forward: nn.Module = moe_layer(model, layer, mesh, out_std)
        else:
            self.feed_forward = FeedForward(model.d_model, model.d_ff, model.activation, mesh, out_std)
        self.feed_forward_norm = RMSNorm(model.d_model, model.norm_eps, mesh, model.norms_by)

    def forward(self, x_TD: Tensor, mask_BS: Tensor, step: StepContext, drop: "Drop") -> tuple[Tensor, MoEStats | None]:
        x_TD = self.attention_norm(x_TD + drop(self.attention(x_TD, mask_BS), "attention"))
        stats = None
        if isinstance(self.feed_forward, MoE):
            y_TD, stats = self.feed_forward(x_TD, step)
        else:
            y_TD = self.feed_forward(x_TD)
        return self.feed_forward_norm(x_TD + drop(y_TD, "feed_forward")), stats


@dataclass(frozen=True)
class Drop:
    """Dropout of what each part of a block adds, by name; the same in every layout.

    first_token: global number of the first of this rank's tokens.
    """

    rate: float
    key: RandomKey
    first_token: int

    def __call__(self, x_TD: Tensor, name: str) -> Tensor:
        return dropout_by_index(x_TD, self.rate, self.key.fold("dropout", name), self.first_token)
