"""What a configuration lets later tokens do to earlier ones, in words for whoever starts a run."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig, MoEConfig


def causality_notes(model: ModelConfig) -> Iterator[str]:
    """A line for each choice under which a token's output depends on tokens after it. Silent when none does.

    Every limit on capacity lets tokens displace one another; only drop_policy `position` with drop_order `token` and
    without a pool_floor keeps to their order.
    """
    if model.moe.num_experts > 0:
        yield from _of_experts(model.moe)
    if model.attention.kind == "switch":
        yield from (f"attention: {note}" for note in _of_experts(model.attention.moe))


def _of_experts(moe: MoEConfig) -> Iterator[str]:
    if moe.router == "expert_choice":
        yield (
            "router=expert_choice is not causal: experts pick among all tokens, later ones included, in training and "
            "in evaluation; a language model's losses then look better than its generation"
        )
        return
    if moe.router == "sinkhorn":
        yield "router=sinkhorn is not causal in training: it balances over all tokens of the micro-step; evaluation is"
    limited = moe.capacity_factor is not None or moe.capacity_schedule
    if limited and moe.drop_policy != "position":
        yield (
            f"drop_policy={moe.drop_policy} is not causal in training: a later token can take an earlier one's place; "
            "evaluation without eval_capacity_factor is"
        )
    elif limited and moe.drop_order == "choice" and moe.top_k > 1:
        yield (
            "drop_order=choice is not causal in training: a later token's first choice can take the place of an "
            "earlier one's second; evaluation without eval_capacity_factor is"
        )
    elif limited and moe.overflow == "reroute":
        yield (
            "overflow=reroute is not causal in training: a token that asks again finds places that later tokens took; "
            "evaluation without eval_capacity_factor is"
        )
    elif limited and moe.pool_floor > 0:
        yield (
            f"pool_floor={moe.pool_floor} is not causal in training: a later token with a sure place takes that of a "
            "neighbour's earlier one; evaluation without eval_capacity_factor is"
        )
