"""Which backend runs: `auto` in the config is resolved here, once, before the model is built.

The resolved config is what the run folder keeps and the log prints; nothing is chosen later, and nothing falls back.
"""

import dataclasses

from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.attention.flash import flash_provider
from moe_dist.kernels.grouped_mm.cpu import replaces

_SHORT = 512  # tokens up to which packed attention is the faster one on CPU in bf16; in fp32 it never is


def resolve_backends(
    model: ModelConfig, ep: int, device_type: str = "cpu", seq_len: int | None = None, precision: str = "fp32"
) -> ModelConfig:
    """A copy of `model` in which every `auto` names its backend."""
    moe, attention = model.moe, model.attention
    if attention == "auto":
        short = seq_len is not None and seq_len <= _SHORT
        attention = "packed" if short and device_type == "cpu" and precision == "bf16" else "flash"
    if moe.dispatch == "auto":
        moe = dataclasses.replace(moe, dispatch="local" if ep == 1 else "all_to_all")
    if moe.experts == "auto":
        moe = dataclasses.replace(moe, experts="grouped_mm")
    return dataclasses.replace(model, attention=attention, moe=moe)


def describe_backends(model: ModelConfig, device_type: str) -> dict[str, str]:
    """Names for the log and environment.json."""
    attention = flash_provider(device_type) if model.attention == "flash" else model.attention
    if model.moe.num_experts == 0:
        return {"attention": attention}
    dispatch = model.moe.dispatch + (f" ({model.moe.wire})" if model.moe.dispatch == "all_to_all" else "")
    experts = model.moe.experts + (" (cpu loop, fused)" if replaces(model.moe.experts, device_type) else "")
    return {"attention": attention, "dispatch": dispatch, "experts": experts}
