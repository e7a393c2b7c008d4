"""What chance alone would drop of a point, by its configuration (statistics/drops.py)."""

from dataclasses import dataclass

from moe_dist.config import Config
from moe_dist.moe.capacity import expert_capacity
from moe_dist.plan.kept import competing_tokens
from moe_dist.study.design.planned import micro_step_tokens
from moe_dist.study.statistics.drops import uniform_drops


@dataclass(frozen=True, slots=True)
class Competition:
    """tokens compete for the rows of pools of experts, capacity rows for each expert; None: no limit."""

    tokens: int
    top_k: int
    num_experts: int
    capacity: int | None
    pool: int


def competition(config: Config, ranks: int) -> Competition | None:
    """Of the feed-forward layers; None where no theory covers the settings: factors by layer or step, rerouting, expert
    choice, attention experts, texts with padding."""
    moe = config.model.moe
    if moe.num_experts == 0 or isinstance(moe.capacity_factor, list) or moe.capacity_schedule:
        return None
    if moe.router == "expert_choice" or moe.overflow == "reroute" or config.model.attention.kind == "switch":
        return None
    if config.task == "classification":
        return None
    tokens = competing_tokens(moe, micro_step_tokens(config, ranks), ranks)
    capacity = expert_capacity(moe.capacity_factor, moe.top_k, tokens, moe.num_experts, moe.min_capacity)
    return Competition(tokens, moe.top_k, moe.num_experts, capacity, moe.capacity_pool)


def dropped_by_chance(config: Config, ranks: int) -> float | None:
    """Share of assignments that uniform random routing would drop, 0 to 1; None where no theory covers the settings."""
    of = competition(config, ranks)
    return None if of is None else uniform_drops(of.tokens, of.top_k, of.num_experts, of.capacity, of.pool).rate
