"""A config.json as a model's configuration, and the way back: by the rules of its family, and no key unsaid."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_dist.config.model import ModelConfig
from moe_dist.interop.families import FAMILIES, Family
from moe_dist.interop.meaning import differences
from moe_dist.interop.settings import Theirs, model_of

_MLA = "attention by latents (MLA), and queries, keys and values here are projections of the token itself"
UNLIKE: Mapping[str, tuple[str, ...]] = {
    "deepseek_v2": (_MLA,),
    "deepseek_v3": (_MLA,),
}
"""Families that are known and cannot come in: what of them the configuration cannot say."""

_NO_MATTER = set(
    "architectures model_type transformers_version torch_dtype dtype _name_or_path use_cache initializer_range "
    "bos_token_id eos_token_id pad_token_id max_position_embeddings output_router_logits pretraining_tp "
    "router_aux_loss_coef aux_loss_coef num_nextn_predict_layers num_mtp_layers attn_implementation "
    "experts_implementation _attn_implementation_autoset is_decoder rope_theta default_theta return_dict "
    "output_attentions output_hidden_states tie_word_embeddings intermediate_size head_dim initial_context_length "
    "experts_per_token ep_size num_attention_heads attention_softmax_in_fp32 scale_attention_softmax_in_fp32 "
    "num_key_value_heads".split()
)
_IN_TRAINING = tuple("attention_dropout router_jitter_noise attn_pdrop embd_pdrop resid_pdrop hidden_dropout".split())


@dataclass(frozen=True)
class Settings:
    """A config.json that was read. notes: lines on what a person should know of it."""

    family: Family
    model: ModelConfig
    notes: list[str] = field(default_factory=list)


def read_settings(values: Mapping[str, Any]) -> Settings:
    """From a config.json. Raises ValueError with a line for each thing that a model here cannot have."""
    name = str(values.get("model_type"))
    if name in UNLIKE:
        raise ValueError("\n".join(f"{name} has {reason}" for reason in UNLIKE[name]))
    if name not in FAMILIES:
        raise ValueError(f"model_type={name} is not among those that come in: {', '.join(FAMILIES)}")
    family, theirs, ours = FAMILIES[name], Theirs(values), dict[str, Any]()
    if values.get("quantization_config") is not None:
        method = dict(values["quantization_config"]).get("quant_method")
        theirs.problems.append(
            f"quantization_config: weights are quantised ({method}); load them with Transformers, dequantised, and "
            "save_pretrained them first"
        )
    try:
        for rule in family.rules:
            rule.read(theirs, ours)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        theirs.problems.append(f"config.json says something of another type than {name} has: {error}")
    if theirs.problems:
        raise ValueError("\n".join(f"{name}: {problem}" for problem in theirs.problems))
    notes = [
        f"{key}={values[key]} acts in training alone and is not taken over" for key in _IN_TRAINING if values.get(key)
    ]
    unknown = sorted(values.keys() - theirs.asked - _NO_MATTER - set(_IN_TRAINING))
    unknown = [key for key in unknown if values[key] is not None]
    if unknown:
        notes.append(f"not known here and not taken over: {', '.join(unknown)}")
    return Settings(family, model_of(ours), notes)


def settings_of(model: ModelConfig, first: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that means the same as `model`, and its settings; `first` is tried before the others.

    Raises ValueError with a line for each field that even the nearest family cannot have.
    """
    nearest: tuple[str, list[str]] | None = None
    for name in sorted(FAMILIES, key=lambda name: name != first):
        family, written = FAMILIES[name], dict[str, Any]()
        for rule in family.rules:
            rule.write(model, written)
        theirs, ours = Theirs(written), dict[str, Any]()
        for rule in family.rules:
            rule.read(theirs, ours)
        lines = theirs.problems + differences(model, model_of(ours))
        if not lines:
            return family, {"model_type": name, "architectures": [family.architecture], **written}
        if nearest is None or len(lines) < len(nearest[1]):
            nearest = name, lines
    assert nearest is not None
    raise ValueError("\n".join(f"no counterpart in {nearest[0]}, the nearest family: {line}" for line in nearest[1]))
