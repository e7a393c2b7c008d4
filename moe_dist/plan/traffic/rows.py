"""How many rows each rank keeps for each expert: what a run has measured, or an even share.

An even share deals out the assignments of the micro-step like cards: assignment number g, in the global order of tokens
and choices, goes to expert g mod E. So loads of experts differ by one at most, also where a rank has fewer assignments
than there are experts, and each rank knows what all others send. Two ranks of 3 tokens, top-2 of 4 experts:

    token          0    1    2  |  3    4    5
    experts       0 1  2 3  0 1 | 2 3  0 1  2 3
    kept_WE      [2, 2, 1, 1]   |  [1, 1, 2, 2]

Legend: W ranks of the world, E experts, C the limit of an expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.model import CapacityFactor, MoEConfig
from moe_dist.moe.capacity import exact_ratio, expert_capacity
from moe_dist.step import Site

Rows = Mapping[tuple[int, Site], Tensor]
"""kept_WE of a run, by micro-step of the optimizer step and routed layer."""


def factor_of(moe: MoEConfig, site: Site, step: int) -> float | None:
    """The capacity factor in force in training: of the step and the layer."""
    factor: CapacityFactor = moe.factor_at(step)
    return factor[(site.layer - moe.first_layer) // moe.every] if isinstance(factor, list) else factor


def limit_of(moe: MoEConfig, site: Site, step: int, tokens: int, world: int) -> int | None:
    """C, where every rank has `tokens` tokens of the layer; None is no limit."""
    factor = factor_of(moe, site, step)
    competing = tokens * world if moe.capacity_scope == "global" else tokens
    ratio = None if factor is None else exact_ratio(factor)
    return expert_capacity(ratio, moe.top_k, competing, moe.num_experts, moe.min_capacity)


@dataclass(frozen=True)
class EvenShare:
    """Assignments of one routed layer, dealt out. tokens: of each rank."""

    moe: MoEConfig
    tokens: int
    world: int

    @property
    def assignments(self) -> int:
        """Of one rank."""
        return self.tokens * self.moe.top_k

    def kept_WE(self, limit: int | None) -> Tensor:
        """int64, under a limit of C rows an expert: of all ranks together, in their order, or of each rank."""
        num_experts = self.moe.num_experts
        if self.moe.router == "expert_choice":  # each expert takes C tokens, as many from each rank, or one more
            assert limit is not None, "a rule refuses expert_choice without a limit"
            share_W = limit // self.world + (torch.arange(self.world) < limit % self.world).long()
            return share_W[:, None].expand(-1, num_experts)
        first_W1 = torch.arange(self.world)[:, None] * self.assignments
        place_WE = (torch.arange(num_experts) - first_W1) % num_experts
        counts_WE = self.assignments // num_experts + (place_WE < self.assignments % num_experts).long()
        if limit is None:
            return counts_WE
        if self.moe.capacity_scope == "local":
            return counts_WE.clamp(max=limit)
        before_WE = counts_WE.cumsum(0) - counts_WE
        return (limit - before_WE).clamp(min=0).minimum(counts_WE)


def measured(rows: Rows, micro: int, site: Site, world: int, num_experts: int) -> Tensor:
    """kept_WE of a layer. Raises ValueError when there is none, or of another shape."""
    kept_WE = rows.get((micro, site))
    if kept_WE is None:
        raise ValueError(f"rows has no counts of {site} in micro-step {micro}: give those of every routed layer")
    if tuple(kept_WE.shape) != (world, num_experts):
        raise ValueError(
            f"rows has counts of shape {list(kept_WE.shape)} for {site}, not [ranks, experts] = "
            f"{[world, num_experts]}: give what each rank keeps for each expert"
        )
    return kept_WE
