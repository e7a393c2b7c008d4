"""What a configuration keeps routers from learning, in words for whoever starts a run."""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig, MoEConfig


def learning_notes(model: ModelConfig) -> Iterator[str]:
    """A line for each choice under which a router gets no gradient from the model's own loss."""
    if model.moe.num_experts > 0 and _always_one(model.moe):
        yield _note("")
    if model.attention.kind == "switch" and _always_one(model.attention.moe):
        yield _note("attention: ")


def _always_one(moe: MoEConfig) -> bool:
    return moe.top_k == 1 and moe.renormalizes


def _note(whose: str) -> str:
    return (
        f"{whose}renormalize_top_1=true gives every chosen expert the weight 1: no gradient of the model's loss "
        "reaches the router, which learns from balancing and z-loss alone"
    )
