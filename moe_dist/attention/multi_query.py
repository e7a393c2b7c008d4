"""Multi-query and grouped-query causal self-attention, cut over tp (arXiv 1911.02150, arXiv 2305.13245).

Query heads are cut over tp, and key/value heads are computed where they are read (parallel/heads.py). Where tp does not
divide their number (multi-query above all), every rank keeps the small key/value weight whole and computes just the
heads that it reads; the weight's gradient is summed over tp.

Legend: B batch, S sequence, T = B * S tokens, D d_model, H query heads, G key/value heads, P width of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.norms import query_key_norm
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import turn_heads
from moe_dist.config.model import AttentionConfig, HeadSizes
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.moe.gate import Replay
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, SharedBias, enter, leave
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter
from moe_dist.step import StepContext


class KeyValueHeads(nn.Module):
    """x -> the keys and values that this rank's query heads read; logical weight [G * 2 * P, D], head after head, and a
    bias [G * 2 * P] if asked for."""

    def __init__(self, sizes: HeadSizes, tp: Group, bias: bool = False) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.tp = tp
        self.assignment = HeadAssignment.of(sizes.num_heads, sizes.num_kv_heads, tp)
        rows, d_model = 2 * sizes.head_dim, sizes.d_model  # rows of a head
        first, held = self.assignment.kv_held.start, len(self.assignment.kv_held)
        logical = (sizes.num_kv_heads * rows, d_model)
        self.cut = tp.size > 1 and not self.assignment.shared
        self.bias = None
        if self.cut:
            spec = ParamSpec(logical, "tensor", first * rows * d_model, d_model**-0.5)
            self.weight = parameter((held * rows, d_model), spec)
            if bias:
                self.bias = parameter((held * rows,), ParamSpec(logical[:1], "tensor", first * rows, 0.0))
        else:
            self.weight = parameter(logical, ParamSpec(logical, std=d_model**-0.5))
            if bias:
                self.bias = parameter(logical[:1], ParamSpec(logical[:1], std=0.0))
        self.rows = slice(0, held * rows) if self.cut else slice(first * rows, (first + held) * rows)

    def forward(self, x_TD: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Two tensors [B, S, G of this rank, P]; G is assignment.kv_read."""
        weight, bias = self._own(self.weight), None if self.bias is None else self._own(self.bias)
        held, reads = len(self.assignment.kv_held), self.assignment.reads
        kv_BSGP = F.linear(x_TD, weight, bias).view(*shape, held, 2, self.head_dim)
        if reads is not None:
            kv_BSGP = kv_BSGP[:, :, list(reads)]
        return kv_BSGP[..., 0, :], kv_BSGP[..., 1, :]

    def _own(self, param: Tensor) -> Tensor:
        """The rows of this rank's heads; where every rank holds all of them, gradients are summed over tp."""
        return (param if self.cut else copy_to_group(param, self.tp))[self.rows]


class CausalSelfAttention(nn.Module):
    """The trainer's attention layer: x_TD -> y_TD, both cut by tokens under sequence parallelism.

    layer: whose window it has, and by which attention dropout draws. norm_eps, kernels: of the norm of queries and
    keys. out_std: of the output projection's initial values, width^-0.5 where None.
    """

    def __init__(
        self,
        sizes: HeadSizes,
        config: AttentionConfig,
        mesh: Mesh,
        layer: int = 0,
        norm_eps: float = 1e-5,
        out_std: float | None = None,
        kernels: str = "torch",
    ) -> None:
        super().__init__()
        tp, width = mesh.tp, sizes.width
        self.config = config
        self.layer = layer
        self.mesh = mesh
        self.num_heads = sizes.num_heads
        self.head_dim = sizes.head_dim
        self.query = ColumnParallelLinear(sizes.d_model, width, tp, sizes.d_model**-0.5, config.qkv_bias)
        self.key_value = KeyValueHeads(sizes, tp, config.qkv_bias)
        self.out = RowParallelLinear(width, sizes.d_model, tp, width**-0.5 if out_std is None else out_std)
        self.out_bias = SharedBias(sizes.d_model, mesh) if config.out_bias else None
        self.qk_norm = query_key_norm(config, sizes, self.key_value.assignment, tp, norm_eps, kernels)
        self.heads = self.key_value.assignment.queries
        self.sinks_H = None
        if config.sinks:
            spec = ParamSpec((sizes.num_heads,), "tensor", self.heads.start, 0.0)
            self.sinks_H = parameter((len(self.heads),), spec)
        self.attend = attention(config.backend)

    def forward(
        self,
        x_TD: Tensor,
        shape: tuple[int, int],
        positions: Positions,
        step: StepContext,
        cache: KVCache | None = None,
        replay: Replay | None = None,
    ) -> tuple[Tensor, None]:
        """shape: (B, S) of the full tokens. With a cache, queries also see what is in it, and are added to it. There
        are no losses, and no decisions to replay."""
        x_TD = enter(x_TD, self.mesh)
        q_BSHP = self.query(x_TD).view(*shape, len(self.heads), self.head_dim)
        k_BSGP, v_BSGP = self.key_value(x_TD, shape)
        if self.config.qk_norm != "none" and self.qk_norm is not None:
            q_BSHP, k_BSGP = self.qk_norm(q_BSHP, k_BSGP)
        if self.config.clip_qkv is not None:
            q_BSHP, k_BSGP, v_BSGP = (
                t.clamp(-self.config.clip_qkv, self.config.clip_qkv) for t in (q_BSHP, k_BSGP, v_BSGP)
            )
        if self.config.qk_ln and self.qk_norm is not None:
            q_BSHP, k_BSGP = self.qk_norm(q_BSHP, k_BSGP)
        if positions.rotary is not None:
            q_BSHP, k_BSGP = turn_heads(q_BSHP, positions.rotary), turn_heads(k_BSGP, positions.rotary)
        if self.config.score_multiplier is not None:  # every backend multiplies by head_dim^-0.5
            q_BSHP = q_BSHP * (self.config.score_multiplier * self.head_dim**0.5)
        q_BHSP, k_BGSP, v_BGSP = q_BSHP.transpose(1, 2), k_BSGP.transpose(1, 2), v_BSGP.transpose(1, 2)
        starts_B = None
        if cache is not None:
            starts_B = cache.starts()
            k_BGSP, v_BGSP = cache.update(k_BGSP, v_BGSP)
        y_BHSP = self.attend(q_BHSP, k_BGSP, v_BGSP, self._pattern(positions, starts_B, shape, step), None)
        y_TD = leave(self.out(y_BHSP.transpose(1, 2).flatten(2).flatten(0, 1)), self.mesh)
        return (y_TD if self.out_bias is None else self.out_bias(y_TD)), None

    def new_cache(self, rows: int, length: int) -> KVCache:
        """For `rows` sequences of at most `length` tokens, in the precision of the weights."""
        weight = self.key_value.weight
        return KVCache(rows, length, self.key_value.assignment.kv_read, self.head_dim, weight.dtype, weight.device)

    def _pattern(
        self, positions: Positions, starts_B: Tensor | None, shape: tuple[int, int], step: StepContext
    ) -> Pattern:
        dropout = None
        if self.config.dropout > 0 and step.phase == "train":
            key = step.key.fold("attention dropout", self.layer)
            dropout = Dropout(self.config.dropout, key, self.mesh.dp.rank * shape[0], self.heads.start, self.num_heads)
        slopes_H = None if positions.slopes_H is None else positions.slopes_H[self.heads.start : self.heads.stop]
        return Pattern(
            window=self.config.window_of(self.layer),
            starts_B=starts_B,
            slopes_H=slopes_H,
            bias=positions.bias,
            sinks_H=self.sinks_H,
            dropout=dropout,
        )
