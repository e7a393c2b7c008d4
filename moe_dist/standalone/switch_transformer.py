"""`Block` and `Transformer`: a causal transformer with attention experts, for whoever brings their own loop.

Legend: B batch, S sequence, T = B * S tokens, D d_model, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import Mesh, single_process_mesh
from moe_dist.parallel.norm import RMSNorm
from moe_dist.parallel.sharding import ParamSpec, initialize, parameter
from moe_dist.standalone.base import Layer, WithAuxLoss, balance_routers, device_of, drawn_seed
from moe_dist.standalone.switch_attention import SwitchMultiQueryAttention

_EPS = 1e-5


class Block(Layer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): pre-norm with RMSNorm, attention experts, dense gelu.

    d_ff: hidden width of the feed-forward, 4 * d_model if None. The rest: as `SwitchMultiQueryAttention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_experts: int,
        dropout: float = 0.0,
        capacity_factor: float | None = 1.0,
        top_k: int = 2,
        load_loss_coef: float = 1e-2,
        *,
        d_ff: int | None = None,
        seed: int | None = None,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        given, mesh, device = mesh, mesh or single_process_mesh(), device_of(device)
        super().__init__(drawn_seed(seed, mesh.world.size), given)
        d_ff = 4 * d_model if d_ff is None else d_ff
        if d_ff < 1:
            raise ValueError(f"d_ff={d_ff} is below 1")
        routed = (dropout, capacity_factor, top_k, load_loss_coef)
        with device:
            self.attention_norm = RMSNorm(d_model, _EPS, mesh)
            self.attention = SwitchMultiQueryAttention(
                d_model, num_heads, num_experts, *routed, seed=self.seed, mesh=given, device=device, **options
            )
            self.feed_forward_norm = RMSNorm(d_model, _EPS, mesh)
            self.feed_forward = FeedForward(d_model, d_ff, "gelu", mesh, d_ff**-0.5)
        initialize(self, self.seed)
        self.to(device)

    def reset_parameters(self) -> None:
        self.attention.reset_parameters()
        initialize(self, self.seed)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        return_aux_loss: bool = False,
        *,
        token_ids: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor | WithAuxLoss:
        """x: [B, S, D] -> the same; with return_aux_loss (y, the auxiliary loss). attn_mask and the rest: as
        `SwitchMultiQueryAttention`."""
        y, aux_loss = self.attention(self.attention_norm(x), attn_mask, True, token_ids=token_ids, step=step)
        x = x + y
        x_TD = self.feed_forward_norm(x).reshape(-1, x.shape[-1])
        x = x + self.feed_forward(x_TD).view(x.shape)
        return WithAuxLoss(x, aux_loss) if return_aux_loss else x


class Transformer(Layer):
    """Embedding, `num_layers` blocks, a last norm, and logits by the embedding matrix.

    Sequences of any length. The rest: as `Block`; with a mesh, each data-parallel rank takes its own sequences.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_experts: int,
        num_layers: int,
        vocab_size: int,
        dropout: float = 0.0,
        capacity_factor: float | None = 1.0,
        top_k: int = 2,
        load_loss_coef: float = 1e-2,
        *,
        seed: int | None = None,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        given, mesh, device = mesh, mesh or single_process_mesh(), device_of(device)
        super().__init__(drawn_seed(seed, mesh.world.size), given)
        for name, size in dict(num_layers=num_layers, vocab_size=vocab_size).items():
            if size < 1:
                raise ValueError(f"{name}={size} is below 1")
        self.vocab_size = vocab_size
        routed = (dropout, capacity_factor, top_k, load_loss_coef)
        # A seed for each block, because draws are by seed; the weights get theirs below.
        seeds = [RandomKey.of(self.seed, "block", layer).value for layer in range(num_layers)]
        with device:
            self.embedding = parameter((vocab_size, d_model), ParamSpec((vocab_size, d_model), std=0.02))
            self.blocks = nn.ModuleList(
                Block(d_model, num_heads, num_experts, *routed, seed=own, mesh=given, device=device, **options)
                for own in seeds
            )
            self.norm = RMSNorm(d_model, _EPS, mesh)
        initialize(self, self.seed)
        self.to(device)

    def reset_parameters(self) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()
        initialize(self, self.seed)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, return_aux_loss: bool = False, *, step: int | None = None
    ) -> Tensor | WithAuxLoss:
        """x: token ids [B, S] -> logits [B, S, V]; with return_aux_loss (logits, the sum of the layers' auxiliary
        losses). attn_mask and step: as `SwitchMultiQueryAttention`. Raises ValueError for what is not [B, S] of ids.
        """
        if x.dim() != 2 or x.is_floating_point():
            raise ValueError(f"x must be token ids [batch, sequence], got {x.dtype} of shape {tuple(x.shape)}")
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.vocab_size:
            raise ValueError(f"token ids {int(x.min())} to {int(x.max())} are outside 0 <= id < {self.vocab_size}")
        hidden, aux_loss = F.embedding(x, self.embedding), self.embedding.new_zeros(())
        for block in self.blocks:
            hidden, of_block = block(hidden, attn_mask, True, token_ids=x, step=step)
            aux_loss = aux_loss + of_block
        logits = F.linear(self.norm(hidden), self.embedding)
        return WithAuxLoss(logits, aux_loss) if return_aux_loss else logits

    def balance(self, group: dist.ProcessGroup | None = None) -> None:
        """Where a bias balances, once an optimizer step: as `MixtureOfExperts.balance`."""
        layers = [block.attention for block in self.blocks if isinstance(block, Block)]
        routers = [layer.attention.router for layer in layers]
        tallies = [tally for layer, router in zip(layers, routers, strict=True) for tally in layer.loads.take([router])]
        balance_routers(routers, tallies, self.cut_over, group)
