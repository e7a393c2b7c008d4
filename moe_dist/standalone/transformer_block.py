"""`TransformerBlock`: one block with a KV cache and an optional MoE layer, for models that are not ours.

Legend: B batch, S sequence, L tokens with those in the cache, D d_model, P width of a head.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_dist.attention.alibi import alibi_slopes
from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.config.model import AttentionConfig, HeadSizes
from moe_dist.config.rules.attention import attention_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.kernels.attention.backend import check_attention
from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.base import Layer, device_of, drawn_seed
from moe_dist.standalone.masks import added_by
from moe_dist.standalone.mixture_of_experts import MixtureOfExperts
from moe_dist.step import StepContext


class TransformerBlock(Layer):
    """y = x + dropout(attention(norm(x))); then y + dropout(feed_forward(norm(y))), causal, layer norm before each.

    use_moe: the feed-forward is a MixtureOfExperts with num_experts and top_k_experts; in training an expert takes at
    most ceil(expert_capacity_factor * top_k * tokens / num_experts) tokens, in evaluation all that come. n_kv_heads:
    key/value heads that the query heads share, None as many as those. position: `none` leaves it to the model around,
    rotary and alibi are the attention's own. seed: of initial weights, and of the experts' random numbers; None draws
    one from torch's generator. moe: any other option of MixtureOfExperts, such as router.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        use_moe: bool = False,
        num_experts: int = 8,
        top_k_experts: int = 2,
        *,
        n_kv_heads: int | None = None,
        position: Literal["none", "rotary", "alibi"] = "none",
        window: int | None = None,
        rope_theta: float = 10000.0,
        attn_impl: Literal["torch", "flash", "flash_attn", "triton"] = "flash",
        activation: Literal["swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu", "gelu_tanh"] = "gelu",
        expert_capacity_factor: float | None = 1.25,
        seed: int | None = None,
        device: torch.device | str | None = None,
        **moe: Any,
    ) -> None:
        super().__init__(drawn_seed(seed))
        device = device_of(device)
        if moe and not use_moe:
            raise TypeError(f"options {sorted(moe)} are of experts, but use_moe=False")
        attention = AttentionConfig(backend=attn_impl, position=position, window=window)
        kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _check(d_model, n_heads, kv_heads, d_ff, attention, device.type)
        self.sizes = HeadSizes.of(d_model, n_heads, kv_heads)
        self.position = position
        self.rope_theta = rope_theta
        with device:
            self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
            self.attention = CausalSelfAttention(self.sizes, attention, single_process_mesh())
            self.dropout = nn.Dropout(dropout)
            if use_moe:
                options = dict(activation=activation, seed=self.seed, device=device) | moe
                self.feed_forward: nn.Module = MixtureOfExperts(
                    d_model, d_ff, num_experts, top_k_experts, dropout, expert_capacity_factor, **options
                )
            else:
                self.feed_forward = FeedForward(d_model, d_ff, activation, single_process_mesh(), d_ff**-0.5)
        self._initialize()
        self.to(device)

    def _initialize(self) -> None:
        initialize(self.attention, self.seed, "attention.")
        if not isinstance(self.feed_forward, MixtureOfExperts):
            initialize(self.feed_forward, self.seed, "feed_forward.")

    def reset_parameters(self) -> None:
        self._initialize()
        for part in (self.attention_norm, self.feed_forward_norm, self.feed_forward):
            if isinstance(part, nn.LayerNorm | MixtureOfExperts):
                part.reset_parameters()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        use_cache: bool = False,
        cache_position: int | None = None,
        return_aux_loss: bool = False,
        *,
        step: int | None = None,
    ) -> tuple[Tensor, KVCache | None, Tensor | None]:
        """x [B, S, D] -> (y [B, S, D], the cache if used, the auxiliary loss if asked for: zero without experts).

        mask: what may be seen, beside causality; bool or 0 and 1, of shape [B, L] for keys, or [S, L], [B, S, L] or
        [B, 1, S, L]. L counts the tokens in the cache. With use_cache, queries also see what is in kv_cache and are
        added to it; cache_position: continue there, forgetting what comes later. step: of the experts' random numbers,
        which pass this is; None counts. Raises ValueError for what does not fit, an
        overflow of the cache included, and for a mask of two dimensions that could be [B, L] as well as [S, L].
        """
        if x.dim() != 3 or x.shape[-1] != self.sizes.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be [batch, tokens, d_model={self.sizes.d_model}]")
        shape = (x.shape[0], x.shape[1])
        cache, starts = self._cache(kv_cache, use_cache, cache_position, shape)
        positions = self._positions(shape, starts, mask, x)
        if cache is not None and cache_position is not None:
            cache.rewind(cache_position)  # when all else was found right
        context = StepContext(RandomKey.of("block"), "train" if self.training else "eval")
        attended_TD, _ = self.attention(self.attention_norm(x).flatten(0, 1), shape, positions, context, cache)
        x = x + self.dropout(attended_TD.view_as(x))
        normed, aux_loss = self.feed_forward_norm(x), x.new_zeros(())
        if isinstance(self.feed_forward, MixtureOfExperts):
            y, aux_loss = self.feed_forward(normed, return_aux_loss=True, step=step)  # it has its own dropout
        else:
            y = self.dropout(self.feed_forward(normed.flatten(0, 1)).view_as(x))
        return x + y, cache, aux_loss if return_aux_loss else None

    def create_kv_cache(
        self,
        max_batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """In the precision and on the device of the block, unless told otherwise."""
        cache = self.attention.new_cache(max_batch_size, max_seq_len)
        return cache.to(device=device, dtype=dtype)

    def _cache(
        self, kv_cache: KVCache | None, use_cache: bool, cache_position: int | None, shape: tuple[int, int]
    ) -> tuple[KVCache | None, list[int]]:
        """The cache if it is used, and the place of the first token of each row."""
        if not use_cache:
            if cache_position is not None:
                raise ValueError(f"cache_position={cache_position} needs use_cache=True and a kv_cache")
            return None, [0] * shape[0]
        if not isinstance(kv_cache, KVCache):
            raise ValueError(
                f"use_cache=True needs a kv_cache, got {type(kv_cache).__name__}: make one with create_kv_cache"
            )
        return kv_cache, kv_cache.check_room(*shape, cache_position)

    def _positions(self, shape: tuple[int, int], starts: list[int], mask: Tensor | None, x: Tensor) -> Positions:
        rotary, slopes_H, bias = None, None, None
        if self.position == "rotary":
            starts_B1 = torch.tensor(starts or [0], device=x.device)[:, None]
            at_BS = starts_B1 + torch.arange(shape[1], device=x.device)
            at_BS = at_BS.double() if x.dtype == torch.float64 else at_BS
            rotary = rotary_table(at_BS, self.sizes.head_dim, self.rope_theta)
        if self.position == "alibi":
            slopes_H = alibi_slopes(self.sizes.num_heads, device=x.device)
        if mask is not None:
            keys = max(starts, default=0) + shape[1]
            bias = added_by(_seen(mask), shape[0], self.sizes.num_heads, shape[1], keys)
        return Positions(rotary, slopes_H, bias=bias)


def _seen(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be bool, or hold 0 and 1 alone with 1 for what may be seen: it is not additive")
    return mask != 0


def _check(d_model: int, heads: int, kv_heads: int, d_ff: int, attention: AttentionConfig, device_type: str) -> None:
    """The rules of the layers, in one ValueError."""
    sizes = dict(d_model=d_model, n_heads=heads, d_ff=d_ff)
    problems = [f"{name}={value} is below 1" for name, value in sizes.items() if value < 1]
    if attention.position not in ("none", "rotary", "alibi"):
        problems.append(f"position={attention.position!r} is none of none, rotary and alibi")
    if not problems and d_model % heads:
        problems.append(f"d_model={d_model} is not divisible by n_heads={heads}")
    if not problems and (kv_heads < 1 or heads % kv_heads):
        problems.append(f"n_heads={heads} is not divisible by n_kv_heads={kv_heads}")
    if not problems and attention.position == "rotary" and d_model // heads % 2:
        problems.append(f"rotary positions need an even width of a head, not {d_model}/{heads}={d_model // heads}")
    refuse([*problems, *attention_rules(attention, 1, section="")])
    check_attention(attention.backend, "attn_impl", device_type)
