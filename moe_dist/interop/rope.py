"""Rotation, and its scaling for long sequences, in a config.json and here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_dist.config.model import ModelConfig
from moe_dist.config.rules.parts import shown
from moe_dist.interop.settings import Ours, Theirs


@dataclass(frozen=True)
class Rope:
    """Rotation, from rope_parameters or from rope_theta and rope_scaling, as older versions write it.

    theta, scaling, share: what missing keys mean. partial: whether the family asks for partial_rotary_factor.
    """

    theta: float = 10000.0
    scaling: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    partial: bool = False

    def read(self, theirs: Theirs, ours: Ours) -> None:
        # Where both are there, Transformers goes by the older one.
        given = theirs.get("rope_scaling", None) or theirs.get("rope_parameters", None) or self.scaling
        theirs.asked |= {"rope_parameters", "rope_theta", "original_max_position_embeddings"}
        rope = dict(given)
        ours["rope_theta"] = float(rope.pop("rope_theta", None) or theirs.get("rope_theta", self.theta))
        share = theirs.get("partial_rotary_factor", self.share)
        share = rope.pop("partial_rotary_factor", share)
        if self.partial:
            ours["attention.rotary_share"] = float(share)
        elif share != 1.0:
            theirs.problems.append(f"partial_rotary_factor={share}: this family turns all of a head")
        name = rope.pop("rope_type", None) or rope.pop("type", "default")
        rope.pop("type", None)
        reader = {"default": _no_scaling, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}
        if name not in reader:
            theirs.problems.append(f"rope_type={name}: rotation here is scaled by {', '.join(list(reader)[1:])}")
            return
        reader[name](rope, theirs, ours)
        for key in rope:
            theirs.problems.append(f"rope {name} with {key}={shown(rope[key])}, which is not known here")

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        at = model.attention
        rope: dict[str, Any] = {"rope_type": "default" if at.rope_scaling == "none" else at.rope_scaling}
        if at.rope_scaling != "none":
            rope["factor"] = at.rope_factor
        if at.rope_scaling in ("yarn", "llama3"):
            rope["original_max_position_embeddings"] = at.rope_original_len
        if at.rope_scaling == "dynamic":
            theirs["max_position_embeddings"] = at.rope_original_len
        if at.rope_scaling == "yarn":
            rope |= {"beta_fast": at.fast_turns, "beta_slow": at.rope_slow_turns, "truncate": at.rope_truncate}
        if at.rope_scaling == "llama3":
            rope |= {"high_freq_factor": at.fast_turns, "low_freq_factor": at.rope_slow_turns}
        # Beside one another as versions before 5 read it, and together as those from 5 on.
        around: dict[str, Any] = {"rope_theta": model.rope_theta}
        if self.partial:
            around["partial_rotary_factor"] = at.rotary_share
        theirs["rope_parameters"] = rope | around
        theirs |= {**around, "rope_scaling": None if at.rope_scaling == "none" else rope}


def _no_scaling(rope: dict[str, Any], theirs: Theirs, ours: Ours) -> None:
    for key in ("factor", "original_max_position_embeddings"):  # of no meaning there
        rope.pop(key, None)


def _linear(rope: dict[str, Any], theirs: Theirs, ours: Ours) -> None:
    ours |= {"attention.rope_scaling": "linear", "attention.rope_factor": _needed(rope, "factor", theirs)}
    rope.pop("original_max_position_embeddings", None)


def _dynamic(rope: dict[str, Any], theirs: Theirs, ours: Ours) -> None:
    """Transformers goes by max_position_embeddings, whatever else is given."""
    _linear(rope, theirs, ours)
    ours |= {
        "attention.rope_scaling": "dynamic",
        "attention.rope_original_len": theirs.get("max_position_embeddings"),
    }


def _needed(rope: dict[str, Any], key: str, theirs: Theirs) -> float:
    if key not in rope:
        theirs.problems.append(f"the scaling of rotation has no {key}")
    return float(rope.pop(key, 1.0))


def _first_length(rope: dict[str, Any], theirs: Theirs) -> int:
    length: int | None = theirs.values.get("original_max_position_embeddings")
    given = rope.pop("original_max_position_embeddings", None)
    return length or given or theirs.get("max_position_embeddings")


def _yarn(rope: dict[str, Any], theirs: Theirs, ours: Ours) -> None:
    first = _first_length(rope, theirs)
    factor = rope.pop("factor", None) or theirs.get("max_position_embeddings") / first
    ours |= {
        "attention.rope_scaling": "yarn",
        "attention.rope_factor": float(factor),
        "attention.rope_original_len": first,
        "attention.rope_fast_turns": float(rope.pop("beta_fast", None) or 32.0),
        "attention.rope_slow_turns": float(rope.pop("beta_slow", None) or 1.0),
        "attention.rope_truncate": rope.pop("truncate", True),
    }
    for key in ("attention_factor", "mscale", "mscale_all_dim"):  # null: as the paper has it, and this house
        if rope.get(key) is None:
            rope.pop(key, None)


def _llama3(rope: dict[str, Any], theirs: Theirs, ours: Ours) -> None:
    ours |= {
        "attention.rope_scaling": "llama3",
        "attention.rope_factor": _needed(rope, "factor", theirs),
        "attention.rope_original_len": _first_length(rope, theirs),
        "attention.rope_fast_turns": _needed(rope, "high_freq_factor", theirs),
        "attention.rope_slow_turns": _needed(rope, "low_freq_factor", theirs),
    }
