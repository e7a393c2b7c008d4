"""Which backend runs: `auto` in the config is resolved here, once, before the model is built.

The resolved config is what the run folder keeps and the log prints; nothing is chosen later, and nothing falls back.
"""

import dataclasses

from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.attention.flash import flash_provider


def resolve_backends(model: ModelConfig, ep: int) -> ModelConfig:
    """A copy of `model` in which every `auto` names its backend."""
    moe = dataclasses.replace(
        model.moe,
        dispatch=_or(model.moe.dispatch, "local" if ep == 1 else "all_to_all"),
        experts=_or(model.moe.experts, "grouped_mm"),
    )
    return dataclasses.replace(model, attention=_or(model.attention, "flash"), moe=moe)


def describe_backends(model: ModelConfig, device_type: str) -> dict[str, str]:
    """Names for the log and environment.json."""
    attention = flash_provider(device_type) if model.attention == "flash" else model.attention
    if model.moe.num_experts == 0:
        return {"attention": attention}
    dispatch = model.moe.dispatch + (f" ({model.moe.wire})" if model.moe.dispatch == "all_to_all" else "")
    return {"attention": attention, "dispatch": dispatch, "experts": model.moe.experts}


def _or(choice: str, automatic: str) -> str:
    return automatic if choice == "auto" else choice
