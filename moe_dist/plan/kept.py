"""How much of what routers ask for the experts have places for, known from the configuration alone.

A limit of C rows leaves places for at most E * C of K * T assignments, so at a capacity factor below 1 at least the
rest is not computed, however the router balances. What imbalance drops beyond that nobody knows before.

Legend: T tokens that compete, K top_k, E experts, C rows of an expert.
"""

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.moe.capacity import expert_capacity


def kept_shares(model: ModelConfig, tokens: int, ranks: int) -> tuple[list[float], float]:
    """The most that can be kept of the assignments of each MoE layer, and of attention experts', 0 to 1.

    tokens: of a forward pass over all `ranks`.
    """
    layers = [min(1.0, places(model.moe, factor, tokens, ranks)) for factor in factors_by_layer(model)]
    attention, factor = model.attention.moe, model.attention.moe.capacity_factor
    if model.attention.kind != "switch" or isinstance(factor, list):
        return layers, 1.0
    return layers, min(1.0, places(attention, factor, tokens, ranks))


def places(moe: MoEConfig, factor: float | None, tokens: int, ranks: int) -> float:
    """Places of all experts of a layer over its assignments; infinite without a limit. Under expert_choice 1, for the
    count of FLOPs has the capacity already."""
    if factor is None:
        return float("inf")
    if moe.router == "expert_choice":
        return 1.0
    competing = competing_tokens(moe, tokens, ranks)
    capacity = expert_capacity(factor, moe.top_k, competing, moe.num_experts, moe.min_capacity)
    assert capacity is not None
    return moe.num_experts * capacity / (moe.top_k * competing)


def competing_tokens(moe: MoEConfig, tokens: float, ranks: int) -> int:
    """T: of `tokens` of a micro-step over all ranks, those that compete for an expert's rows."""
    return round(tokens / ranks if moe.capacity_scope == "local" else tokens)


def factors_by_layer(model: ModelConfig) -> list[float | None]:
    """The capacity factor of each MoE layer."""
    factor = model.moe.capacity_factor
    return factor if isinstance(factor, list) else [factor] * model.moe.layer_count(model.num_layers)
