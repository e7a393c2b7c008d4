"""What of a model's configuration decides its logits, so that two configurations can be compared in what they mean."""

from dataclasses import fields, replace
from typing import Any

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.rules.parts import shown
from moe_dist.moe.experts import expert_widths, shared_width

_PLAIN = (
    "vocab_size d_model num_layers num_heads num_kv_heads norm norm_eps block activation tie_embeddings "
    "embedding_multiplier residual_multiplier logits_scaling"
).split()
_OF_ATTENTION = "kind position rope_scaling qkv_bias out_bias clip_qkv qk_ln qk_norm sinks".split()
_OF_SCALING = {
    "none": "",
    "linear": "rope_factor",
    "ntk": "rope_factor",
    "dynamic": "rope_factor rope_original_len",
    "yarn": "rope_factor rope_original_len fast_turns rope_slow_turns rope_truncate",
    "llama3": "rope_factor rope_original_len fast_turns rope_slow_turns",
}


def meaning(model: ModelConfig) -> dict[str, Any]:
    """All that decides logits beside weights, by its name in the configuration: two models that agree in this and in
    their weights give the same. Not part of it: how something is computed, and what happens in training alone."""
    at, layers = model.attention, list(model.moe.layers(model.num_layers))
    found: dict[str, Any] = {f"model.{name}": getattr(model, name) for name in _PLAIN}
    found["model.head_dim"] = model.head_width
    names = [*_OF_ATTENTION, *_OF_SCALING[at.rope_scaling].split()]
    found |= {f"model.attention.{name}": getattr(at, name) for name in names}
    if at.position == "rotary":
        found |= {"model.rope_theta": model.rope_theta, "model.attention.rotary_share": at.rotary_share}
    if at.position == "learned":
        found["model.max_positions"] = model.max_positions
    found["model.attention.score_multiplier"] = score_multiplier(model)
    found["model.attention.window"] = [at.window_of(layer) for layer in range(model.num_layers)]
    dense = len(layers) < model.num_layers
    found |= {"model.d_ff": model.d_ff if dense else None, "model.ff_bias": model.ff_bias and dense}
    found["model.moe.first"] = layers
    if layers:
        found |= _of_experts(model.moe, "model.moe")
        found["model.moe.d_ff"] = list(expert_widths(model.moe, model.d_ff))
        found["model.moe.num_shared_experts"] = shared_width(model.moe, model.d_ff)
    if at.kind == "switch":
        found |= _of_experts(at.moe, "model.attention.moe")
    if at.kind == "routed":
        found |= {f"model.attention.routed.{each.name}": getattr(at.routed, each.name) for each in fields(at.routed)}
    return found


def _of_experts(moe: MoEConfig, section: str) -> dict[str, Any]:
    grouped = moe if moe.num_groups > 1 else replace(moe, top_k_groups=1)
    names = "num_experts top_k router router_bias num_groups top_k_groups routed_scale shared_gate expert_bias out_bias"
    found = {name: getattr(grouped, name) for name in names.split()}
    found["renormalize"] = moe.renormalizes
    found["balance"] = moe.router == "sigmoid" or bool({"sign", "quantile"} & set(moe.balanced_by.split("+")))
    return {f"{section}.{name}": value for name, value in found.items()}


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """A line for each field in which they mean something else: what it is in `model`. What only one of them has comes
    with a choice in which they differ."""
    here, there = meaning(model), meaning(other)
    return [_difference(name, here, there) for name in here if name in there and here[name] != there[name]]


def _difference(name: str, here: dict[str, Any], there: dict[str, Any]) -> str:
    section, _, field = name.rpartition(".")
    if field == "renormalize" and here[f"{section}.top_k"] == 1 and not here[name]:  # as written in a configuration
        return (
            f"{section}.top_k=1 with {section}.renormalize_top_1=false, where weights of a token's experts always sum "
            f"to 1; train with {section}.top_k=2 or more, or with model.attention.qk_norm=head, as qwen3_moe has it, "
            "which takes weights as they are"
        )
    return f"{name}={shown(here[name])}, where this family can only have {shown(there[name])}"


def score_multiplier(model: ModelConfig) -> float:
    """`model.attention.score_multiplier`, and what null stands for."""
    given = model.attention.score_multiplier
    return model.head_width**-0.5 if given is None else given
