"""The rules of attention experts, kind = switch: of model.attention, or of a layer that stands alone."""

from collections.abc import Iterator
from dataclasses import replace

from moe_dist.config.model import AttentionConfig, MoEConfig
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import key, shown
from moe_dist.config.schema import ParallelConfig

# Fields of MoEConfig that say nothing about attention experts, and the value that they keep.
NOT_OF_ATTENTION = dict(
    d_ff=None,
    every=1,
    first=None,
    num_shared_experts=0,
    shared_d_ff=None,
    shared_gate=False,
    expert_bias=False,
    out_bias=False,
    overlap_chunks=1,
)
_NO_WIDTH = 0  # attention experts have no hidden layer that could be cut


def switch_rules(
    attention: AttentionConfig,
    parallel: ParallelConfig,
    *,
    num_layers: int,
    section: str = "model.attention",
    inner: str = "model.attention.moe",
) -> Iterator[str]:
    """inner: where the fields of `attention.moe` stand. num_layers: of the model."""
    moe = attention.moe
    if attention.kind != "switch":
        if moe != MoEConfig():
            yield f"{inner} is of kind=switch, not {attention.kind}; set {key(section, 'kind')} or clear {inner}"
        return
    if moe.num_experts < 1:
        yield f"num_experts={moe.num_experts} of attention is below 1; raise {key(inner, 'num_experts')}"
        return
    for name in ("qkv_bias", "qk_ln", "qk_norm", "sinks", "score_multiplier"):
        value, off = getattr(attention, name), getattr(AttentionConfig(), name)
        if value != off:
            yield f"{name}={shown(value)} is not of kind=switch; set {key(section, name)} to {shown(off)}"
    for name, kept in NOT_OF_ATTENTION.items():
        value = getattr(moe, name)
        if value != kept:
            yield f"{name}={value} is of feed-forward experts, not of attention's; leave {key(inner, name)} out"
    if moe.router == "expert_choice":
        yield (
            "router=expert_choice is not for attention experts: every token is a candidate of every expert, so its "
            f"queries would be those of all num_experts={moe.num_experts}; set {key(inner, 'router')} to softmax"
        )
    if moe.experts == "triton":
        where = key(inner, "experts")
        yield f"experts=triton is of feed-forward experts, not of attention's; set {where} to grouped_mm"
    if parallel.etp > 1:
        yield f"etp={parallel.etp} cannot cut attention experts; set parallel.etp to 1"
    plain = replace(moe, **NOT_OF_ATTENTION)  # type: ignore[arg-type]
    yield from moe_rules(plain, parallel, d_ff=_NO_WIDTH, num_layers=num_layers, section=inner)
