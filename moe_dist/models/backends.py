"""Which backend runs: `auto` in the config is resolved here, once, before the model is built.

The resolved config is what the run folder keeps and the log prints; nothing is chosen later, and nothing falls back.
"""

import dataclasses
from importlib.util import find_spec
from typing import Any, Literal

from moe_dist.config.model import AttentionConfig, HeadSizes, ModelConfig, MoEConfig
from moe_dist.config.rules.parts import key
from moe_dist.kernels.attention.backend import check_attention, describe_attention
from moe_dist.kernels.grouped_mm.cpu import replaces
from moe_dist.kernels.grouped_mm.onednn import describe_products
from moe_dist.kernels.packages import APEX, check_package
from moe_dist.kernels.registry import check_triton

Kernels = Literal["auto", "torch", "triton"]

_SHORT, _MANY = 1024, 4  # tokens up to which, and readers of a key/value head from which, packed is faster on CPU


def resolve_backends(model: ModelConfig, ep: int, device_type: str = "cpu", seq_len: int | None = None) -> ModelConfig:
    """A copy of `model` in which every `auto` names its backend. ep: ranks that one set of experts lies on.

    Raises ValueError for what cannot run: Triton, flash-attn and apex where they are not installed, or on CPU (Triton
    has an interpreter there). So do the functions below, of a section each, which stands at `section`.
    """
    if model.norm_kernels == "triton":
        check_triton("model.norm_kernels", "torch", device_type)
    if model.norm_kernels == "apex":
        check_package(APEX, "model.norm_kernels=apex", "same", device_type)
    return dataclasses.replace(
        model,
        attention=resolve_attention(model.attention, model.head_sizes, ep, device_type, seq_len),
        kernels=resolve_kernels(model.kernels, device_type),
        moe=resolve_experts(model.moe, ep, device_type),
    )


def resolve_kernels(kernels: Kernels, device_type: str, section: str = "model") -> Kernels:
    if kernels == "auto":
        return "triton" if device_type == "cuda" and find_spec("triton") else "torch"
    if kernels == "triton":
        check_triton(key(section, "kernels"), "torch", device_type)
    return kernels


def resolve_attention(
    attention: AttentionConfig,
    sizes: HeadSizes,
    ep: int,
    device_type: str,
    seq_len: int | None = None,
    section: str = "model.attention",
) -> AttentionConfig:
    """With its experts where it has any."""
    if attention.kind == "switch":
        moe = resolve_experts(attention.moe, ep, device_type, key(section, "moe"))
        attention = dataclasses.replace(attention, moe=moe)
    check_attention(attention.backend, key(section, "backend"), device_type)
    if attention.backend != "auto":
        return attention
    short = device_type == "cpu" and seq_len is not None and seq_len <= _SHORT
    readers = sizes.num_heads // sizes.num_kv_heads * (attention.moe.top_k if attention.kind == "switch" else 1)
    packed = short and readers >= _MANY and attention.kind != "routed"
    return dataclasses.replace(attention, backend="packed" if packed else "flash")


def resolve_experts(moe: MoEConfig, ep: int, device_type: str, section: str = "model.moe") -> MoEConfig:
    if moe.dispatch == "auto":
        moe = dataclasses.replace(moe, dispatch="local" if ep == 1 else "all_to_all")
    if moe.experts == "auto":
        uneven = isinstance(moe.d_ff, list) and device_type != "cpu"
        moe = dataclasses.replace(moe, experts="loop" if uneven else "grouped_mm")
    if moe.experts == "triton":
        check_triton(key(section, "experts"), "grouped_mm", device_type)
    return moe


def plainest(model: ModelConfig) -> ModelConfig:
    """The same parameters on backends that every machine has: for who asks a model what it is made of."""
    anywhere: dict[str, Any] = dict(dispatch="local", experts="loop", overlap_chunks=1)
    moe, of_attention = (dataclasses.replace(each, **anywhere) for each in (model.moe, model.attention.moe))
    attention = dataclasses.replace(model.attention, backend="torch", moe=of_attention)
    return dataclasses.replace(model, attention=attention, kernels="torch", norm_kernels="same", moe=moe)


def describe_auto_attention(device_type: str) -> str:
    """What `model.attention.backend: auto` stands for, whatever the model: by the rule of resolve_attention."""
    usual = describe_attention("flash")
    if device_type != "cpu":
        return usual
    return f"packed up to {_SHORT:,} tokens where at least {_MANY} query heads share a key, else {usual}"


def describe_backends(model: ModelConfig, device_type: str) -> dict[str, str]:
    """Names for the log and environment.json."""
    attention = describe_attention(model.attention.backend)
    if model.attention.kind != "multi_query":
        attention = f"{model.attention.kind} ({attention})"
    named = {"attention": attention, "kernels": model.kernels}
    if model.norm_kernels != "same":
        named["norm"] = APEX.describe() if model.norm_kernels == "apex" else model.norm_kernels
    if model.attention.kind == "switch":
        of_attention = model.attention.moe
        loops = " (cpu loop)" if replaces(of_attention.experts, device_type) else ""
        named |= {
            "attention_dispatch": _describe_dispatch(of_attention),
            "attention_experts": of_attention.experts + loops,
        }
    moe = model.moe
    if moe.num_experts == 0:
        return named
    experts: str = moe.experts
    if replaces(moe.experts, device_type):
        experts += f" (cpu loop, fused; fp32 products {describe_products(moe.cpu_products)})"
    return named | {"dispatch": _describe_dispatch(moe), "experts": experts}


def _describe_dispatch(moe: MoEConfig) -> str:
    wire: list[str] = [moe.wire] if moe.dispatch == "all_to_all" else []
    wire += [moe.wire_dtype] if moe.wire_dtype != "same" else []
    wire += [f"{moe.overlap_chunks} chunks"] if moe.overlap_chunks > 1 else []
    return moe.dispatch + (f" ({', '.join(wire)})" if wire else "")
