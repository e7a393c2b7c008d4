"""Multi-query and grouped-query causal self-attention, cut over tp (arXiv 1911.02150, arXiv 2305.13245).

Query heads are cut over tp. Key/value heads are cut too when tp divides their number; otherwise (multi-query above all)
every rank keeps the small key/value weight whole, computes just the heads that its own query heads read, and the
weight's gradient is summed over tp. So tp may be larger than num_kv_heads, and no rank is idle.

Legend: B batch, S sequence, T = B * S tokens, D d_model, H query heads, G key/value heads, P width of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.rotary import apply_rotary
from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.attention.backend import attention
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, enter, leave
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.sharding import ParamSpec, parameter


class KeyValueHeads(nn.Module):
    """x -> the keys and values that this rank's query heads read; logical weight [G * 2 * P, D], head after head."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, tp: Group) -> None:
        super().__init__()
        self.head_dim, self.tp = head_dim, tp
        rows = 2 * head_dim
        queries = num_heads // tp.size
        readers = [head * num_kv_heads // num_heads for head in range(tp.rank * queries, (tp.rank + 1) * queries)]
        first, held = readers[0], readers[-1] - readers[0] + 1
        logical = (num_kv_heads * rows, d_model)
        self.cut = tp.size > 1 and num_kv_heads % tp.size == 0
        if self.cut:
            spec = ParamSpec(logical, "tensor", first * rows * d_model, d_model**-0.5)
            self.weight = parameter((held * rows, d_model), spec)
        else:
            self.weight = parameter(logical, ParamSpec(logical, std=d_model**-0.5))
        self.rows = slice(0, held * rows) if self.cut else slice(first * rows, (first + held) * rows)
        # Which of the computed heads each query head reads; None where it is a plain repetition.
        local = [reader - first for reader in readers]
        regular = queries % held == 0 and local == [head // (queries // held) for head in range(queries)]
        self.reads: list[int] | None = None if regular else local

    def forward(self, x_TD: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        weight = self.weight if self.cut else copy_to_group(self.weight, self.tp)
        kv_BSGP = F.linear(x_TD, weight[self.rows]).view(*shape, -1, 2, self.head_dim)
        if self.reads is not None:
            kv_BSGP = kv_BSGP[:, :, self.reads]
        return kv_BSGP[..., 0, :], kv_BSGP[..., 1, :]


class CausalSelfAttention(nn.Module):
    """The trainer's attention layer: x_TD -> y_TD, both cut by tokens under sequence parallelism."""

    def __init__(self, model: ModelConfig, tp: Group, sequence_parallel: bool, out_std: float) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.head_dim = model.head_dim or model.d_model // model.num_heads
        width = model.num_heads * self.head_dim
        self.query = ColumnParallelLinear(model.d_model, width, tp, model.d_model**-0.5)
        self.key_value = KeyValueHeads(model.d_model, model.num_heads, model.num_kv_heads, self.head_dim, tp)
        self.out = RowParallelLinear(width, model.d_model, tp, out_std)
        self.attend = attention(model.attention.backend)

    def forward(self, x_TD: Tensor, shape: tuple[int, int], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """shape: (B, S) of the full tokens. rotary: the table of positions 0..S-1."""
        x_TD = enter(x_TD, self.tp, self.sequence_parallel)
        q_BSHP = apply_rotary(self.query(x_TD).view(*shape, -1, self.head_dim), rotary)
        k_BSGP, v_BSGP = self.key_value(x_TD, shape)
        k_BSGP = apply_rotary(k_BSGP, rotary)
        q_BHSP, k_BGSP, v_BGSP = q_BSHP.transpose(1, 2), k_BSGP.transpose(1, 2), v_BSGP.transpose(1, 2)
        y_BHSP = self.attend(q_BHSP, k_BGSP, v_BGSP, None, None)
        y_TD = self.out(y_BHSP.transpose(1, 2).reshape(-1, q_BSHP.shape[2] * self.head_dim))
        return leave(y_TD, self.tp, self.sequence_parallel)
