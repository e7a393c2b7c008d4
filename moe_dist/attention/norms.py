"""Norms of queries and keys before they meet, so that no score grows without bound.

| option           | queries of a token       | keys of a token             | paper                      |
|------------------|--------------------------|-----------------------------|----------------------------|
| qk_ln            | layer norm of all heads  | layer norm of each head     | ViT-22B, 2302.05442, eq. 4 |
| qk_norm = head   | RMSNorm of each head     | RMSNorm of each head        | Qwen3, 2505.09388          |
| qk_norm = width  | RMSNorm of all heads     | RMSNorm of all heads        | OLMoE, 2409.02060          |

Heads are cut over tp: what is taken over all of them is summed over its ranks, a key head that several ranks hold by
the first of them alone.

Legend: B batch, S sequence, H query heads of this rank, G key heads that they read, P width of a head, M = H * P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model import AttentionConfig, HeadSizes
from moe_dist.kernels.registry import norm_kernel
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.norm import mean_over_slices, norm_over_group
from moe_dist.parallel.sharding import ParamSpec, parameter


class QueryKeyLayerNorm(nn.Module):
    """qk_ln: (q [B, S, H, P], k [B, S, G, P]) -> the same, normalised."""

    def __init__(self, sizes: HeadSizes, tp: Group, eps: float) -> None:
        super().__init__()
        self.tp = tp
        self.eps = eps
        width, head_dim = sizes.width, sizes.head_dim
        local = width // tp.size
        first = tp.rank * local
        self.query_weight = parameter((local,), ParamSpec((width,), "tensor", first, None))
        self.query_bias = parameter((local,), ParamSpec((width,), "tensor", first, 0.0))
        self.key_weight = parameter((head_dim,), ParamSpec((head_dim,), std=None))
        self.key_bias = parameter((head_dim,), ParamSpec((head_dim,), std=0.0))

    def forward(self, q_BSHP: Tensor, k_BSGP: Tensor) -> tuple[Tensor, Tensor]:
        q_BSM = norm_over_group(q_BSHP.flatten(2), self.query_weight, self.query_bias, self.eps, self.tp)
        weight, bias = copy_to_group(self.key_weight, self.tp), copy_to_group(self.key_bias, self.tp)
        return q_BSM.view_as(q_BSHP), F.layer_norm(k_BSGP, k_BSGP.shape[-1:], weight, bias, self.eps)


class HeadNorm(nn.Module):
    """qk_norm = head: one scale of width P for all query heads, and one for all key heads."""

    def __init__(self, sizes: HeadSizes, tp: Group, eps: float, kernels: str) -> None:
        super().__init__()
        self.tp = tp
        self.eps = eps
        self.kernels = kernels
        shape = (sizes.head_dim,)
        self.query_weight, self.key_weight = (parameter(shape, ParamSpec(shape, std=None)) for _ in range(2))

    def forward(self, q_BSHP: Tensor, k_BSGP: Tensor) -> tuple[Tensor, Tensor]:
        norm = norm_kernel(self.kernels, q_BSHP.device.type)
        weights = (copy_to_group(weight, self.tp) for weight in (self.query_weight, self.key_weight))
        q_BSHP, k_BSGP = (norm(t, weight, self.eps) for t, weight in zip((q_BSHP, k_BSGP), weights, strict=True))
        return q_BSHP, k_BSGP


class WidthNorm(nn.Module):
    """qk_norm = width: scales of all query heads [H * P] and all key heads [G * P], cut over tp as the heads are."""

    def __init__(self, sizes: HeadSizes, assignment: HeadAssignment, tp: Group, eps: float) -> None:
        super().__init__()
        self.tp = tp
        self.eps = eps
        width, head_dim = sizes.width, sizes.head_dim
        local, self.key_width, held = width // tp.size, sizes.num_kv_heads * head_dim, assignment.kv_held
        self.query_weight = parameter((local,), ParamSpec((width,), "tensor", tp.rank * local, None))
        logical = (self.key_width,)
        self.cut = tp.size > 1 and not assignment.shared
        if self.cut:
            spec = ParamSpec(logical, "tensor", held.start * head_dim, None)
            self.key_weight = parameter((len(held) * head_dim,), spec)
        else:
            self.key_weight = parameter(logical, ParamSpec(logical, std=None))
        reads = range(len(held)) if assignment.reads is None else assignment.reads
        heads = [held[place] for place in reads]  # the key head in each place of k
        self.rows = _slice_of([head - held.start for head in heads] if self.cut else heads)
        self.owned = _slice_of([heads.index(head) for head in assignment.kv_owned])

    def forward(self, q_BSHP: Tensor, k_BSGP: Tensor) -> tuple[Tensor, Tensor]:
        q_BSM = norm_over_group(q_BSHP.flatten(2), self.query_weight, None, self.eps, self.tp)
        weight = self.key_weight if self.cut else copy_to_group(self.key_weight, self.tp)
        weight_GP = weight.view(-1, k_BSGP.shape[-1])[self.rows]
        wide = k_BSGP.to(torch.promote_types(k_BSGP.dtype, torch.float32))
        mean_BS1 = mean_over_slices(wide[:, :, self.owned].square().flatten(2), self.key_width, self.tp)
        scaled = wide * (mean_BS1 + self.eps).rsqrt()[..., None] * weight_GP
        return q_BSM.view_as(q_BSHP), scaled.to(k_BSGP.dtype)


QueryKeyNorm = QueryKeyLayerNorm | HeadNorm | WidthNorm


def query_key_norm(
    config: AttentionConfig, sizes: HeadSizes, assignment: HeadAssignment, tp: Group, eps: float, kernels: str
) -> QueryKeyNorm | None:
    """The norm that `config` asks for; None: none."""
    if config.qk_norm == "head":
        return HeadNorm(sizes, tp, eps, kernels)
    if config.qk_norm == "width":
        return WidthNorm(sizes, assignment, tp, eps)
    return QueryKeyLayerNorm(sizes, tp, eps) if config.qk_ln else None


def _slice_of(places: list[int]) -> slice | list[int]:
    """Neighbours as a slice: a list is copied to the device at every use."""
    first = places[0] if places else 0
    neighbours = places == list(range(first, first + len(places)))
    return slice(first, first + len(places)) if neighbours else places
