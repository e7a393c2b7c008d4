"""The rules of attention experts, model.attention.kind = switch: `validate` asks for all of them."""

from collections.abc import Iterator
from dataclasses import replace

from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.schema import Config

SECTION = "model.attention.moe"
# Fields of MoEConfig that say nothing about attention experts, and the value that they keep.
NOT_OF_ATTENTION = dict(d_ff=None, every=1, num_shared_experts=0, expert_bias=False, overlap_chunks=1)


def switch_rules(config: Config) -> Iterator[str]:
    model, attention, moe = config.model, config.model.attention, config.model.attention.moe
    if attention.kind != "switch":
        if moe != MoEConfig():
            yield f"{SECTION} is of kind=switch, not {attention.kind}; set model.attention.kind or clear {SECTION}"
        return
    if moe.num_experts < 1:
        yield f"num_experts={moe.num_experts} of attention is below 1; raise {SECTION}.num_experts"
        return
    if model.num_kv_heads != 1:
        yield f"num_kv_heads={model.num_kv_heads} with kind=switch, which has one for all; set model.num_kv_heads to 1"
    for name in ("qk_ln", "sinks"):
        if getattr(attention, name):
            yield f"{name}=true is not of kind=switch; set model.attention.{name} to false"
    for name, kept in NOT_OF_ATTENTION.items():
        value = getattr(moe, name)
        if value != kept:
            yield f"{name}={value} is of feed-forward experts, not of attention's; leave {SECTION}.{name} out"
    if moe.router == "expert_choice":
        yield (
            "router=expert_choice is not for attention experts: every token is a candidate of every expert, so its "
            f"queries would be those of all num_experts={moe.num_experts}; set {SECTION}.router to softmax"
        )
    if moe.experts == "triton":
        yield f"experts=triton is of feed-forward experts, not of attention's; set {SECTION}.experts to grouped_mm"
    if config.parallel.etp > 1:
        yield f"etp={config.parallel.etp} cannot cut attention experts; set parallel.etp to 1"
    plain = replace(moe, **NOT_OF_ATTENTION)  # type: ignore[arg-type]
    for problem in moe_rules(replace(config, model=replace(model, moe=plain))):
        yield f"attention experts: {problem.replace('model.moe.', f'{SECTION}.')}"
