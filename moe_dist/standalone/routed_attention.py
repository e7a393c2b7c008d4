"""`MixtureOfAutoregressiveAttention`: routed autoregressive attention on its own, for models that are not ours.

Legend: B batch, S sequence, T = B * S, D dim, H heads, P dim_head.
"""

import torch
from torch import Tensor, nn

from moe_dist.attention.routed import Rotary, RoutedAttention
from moe_dist.config.model import HeadSizes, RoutedAttentionConfig
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.attention.pattern import Dropout
from moe_dist.kernels.coordinate_descent.backend import coordinate_descent
from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.norm import RMSNorm
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.base import Layer, drawn_seed


class MixtureOfAutoregressiveAttention(Layer):
    """Local attention of every token, plus `num_experts` attentions of a few chosen queries over a few chosen keys.

    Token t sees tokens t - local_attn_window_size to t. The sequence is cut into windows of routed_window_size (None:
    local_attn_window_size); in each but the first, every expert chooses num_routed_queries tokens, which see
    num_routed_key_values tokens chosen out of all windows before, and a learned null key. Their outputs are added to
    the local ones, and the expert's null token to those of all other tokens; average_routed: the mean instead of the
    sum. A sequence no longer than a window has local attention alone. attention/routing_tokens.py says who is chosen.

    causal_routing: a token's output depends on no later token, so the layer gives the same for a prefix. False: queries
    are the best of their window, as published, and that is not causal. cosine_routing: False scores tokens by the
    product with the routing token, as published. prenorm: RMSNorm of x, for all of it. dropout: of attention weights,
    in training, drawn from torch's generator. use_triton: coordinate descent in our Triton kernel. flash_attn: torch's
    fused attention, else plain maths. seed: of initial weights; None draws one from torch's generator. Products of
    matrices run in x's precision, which must be that of the parameters; routing runs in fp32.
    """

    def __init__(
        self,
        dim: int,
        num_routed_queries: int,
        num_routed_key_values: int,
        local_attn_window_size: int,
        routed_window_size: int | None = None,
        num_experts: int = 2,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        use_triton: bool = False,
        flash_attn: bool = True,
        prenorm: bool = True,
        average_routed: bool = False,
        *,
        causal_routing: bool = True,
        cosine_routing: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(drawn_seed(seed))
        sizes = dict(
            dim=dim,
            num_routed_queries=num_routed_queries,
            num_routed_key_values=num_routed_key_values,
            local_attn_window_size=local_attn_window_size,
            routed_window_size=routed_window_size,
            num_experts=num_experts,
            dim_head=dim_head,
            heads=heads,
        )
        _check_sizes(sizes)
        if dim_head % 2:
            raise ValueError(f"dim_head={dim_head} is odd; rotary embedding turns pairs of numbers: make it even")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is outside 0 <= dropout < 1")
        routed = RoutedAttentionConfig(
            num_experts=num_experts,
            num_routed_queries=num_routed_queries,
            num_routed_key_values=num_routed_key_values,
            local_window=local_attn_window_size,
            routed_window=routed_window_size,
            average_routed=average_routed,
            causal_routing=causal_routing,
            cosine_routing=cosine_routing,
        )
        self.dim, self.heads, self.dim_head, self.dropout = dim, heads, dim_head, dropout
        self.norm = RMSNorm(dim, 1e-5, single_process_mesh()) if prenorm else nn.Identity()
        attend = attention("flash" if flash_attn else "torch")
        descend = coordinate_descent("triton" if use_triton else "torch")
        head_sizes = HeadSizes(dim, heads, heads, dim_head)
        out_std = head_sizes.width**-0.5
        self.attention = RoutedAttention(head_sizes, routed, attend, descend, Group(), out_std)
        initialize(self, self.seed)

    def forward(
        self,
        x: Tensor,
        rotary_emb: Tensor | None = None,
        num_routed_queries: int | None = None,
        num_routed_key_values: int | None = None,
    ) -> Tensor:
        """x: [B, S, dim] -> the same. rotary_emb: angles in radians, [S, dim_head] for all heads, or
        [S, heads * dim_head]; they turn queries and keys, local and routed. The numbers of routed tokens replace those
        of the layer."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be [batch, sequence, dim={self.dim}]")
        _check_sizes(dict(num_routed_queries=num_routed_queries, num_routed_key_values=num_routed_key_values))
        rotary = None if rotary_emb is None else self._rotary(rotary_emb, x.shape[1])
        if not x.numel():
            return x.clone()
        drops = None
        if self.training and self.dropout > 0:
            drops = Dropout(self.dropout, RandomKey.of(int(torch.randint(2**63 - 1, (), device="cpu"))))
        x_TD = self.norm(x).reshape(-1, self.dim)
        y_TD = self.attention(x_TD, x.shape[:2], rotary, drops, num_routed_queries, num_routed_key_values)
        return y_TD.view(x.shape)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim_head={self.dim_head}, dropout={self.dropout}, {self.attention.routed}"

    def _rotary(self, angles: Tensor, length: int) -> Rotary:
        widths = (self.dim_head, self.heads * self.dim_head)
        if angles.dim() != 2 or len(angles) != length or angles.shape[1] not in widths:
            raise ValueError(
                f"rotary_emb has shape {tuple(angles.shape)}, but must hold an angle for each of the {length} tokens "
                f"and each number of a head, [{length}, {widths[0]}], or of all heads, [{length}, {widths[1]}]"
            )
        angles_1SHP = angles.view(1, length, -1, self.dim_head)
        return angles_1SHP.cos(), angles_1SHP.sin()


def _check_sizes(sizes: dict[str, int | None]) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is below 1")
