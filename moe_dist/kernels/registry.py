"""Which backend runs: `auto` in the config is resolved here, once, before the model is built.

The resolved config is what the run folder keeps and the log prints; nothing is chosen later, and nothing falls back.
"""

import dataclasses

from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.attention.flash import flash_provider
from moe_dist.kernels.grouped_mm.cpu import replaces


def resolve_backends(model: ModelConfig, ep: int) -> ModelConfig:
    """A copy of `model` in which every `auto` names its backend."""
    moe, attention = model.moe, model.attention
    if moe.dispatch == "auto":
        moe = dataclasses.replace(moe, dispatch="local" if ep == 1 else "all_to_all")
    if moe.experts == "auto":
        moe = dataclasses.replace(moe, experts="grouped_mm")
    return dataclasses.replace(model, attention="flash" if attention == "auto" else attention, moe=moe)


def describe_backends(model: ModelConfig, device_type: str) -> dict[str, str]:
    """Names for the log and environment.json."""
    attention = flash_provider(device_type) if model.attention == "flash" else model.attention
    if model.moe.num_experts == 0:
        return {"attention": attention}
    dispatch = model.moe.dispatch + (f" ({model.moe.wire})" if model.moe.dispatch == "all_to_all" else "")
    experts = model.moe.experts + (" (cpu loop, fused)" if replaces(model.moe.experts, device_type) else "")
    return {"attention": attention, "dispatch": dispatch, "experts": experts}
