"""Heads, windows and attention experts in a config.json and here; rotation is in rope.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model import ModelConfig
from moe_dist.interop.meaning import score_multiplier
from moe_dist.interop.settings import Ours, Theirs


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads, and their width. kv_heads, head_dim: what a missing key means. null means as many
    key/value heads as query heads, and d_model / num_heads."""

    kv_heads: int | None = None
    head_dim: int | None = None

    def read(self, theirs: Theirs, ours: Ours) -> None:
        heads, groups = theirs.get("num_attention_heads"), theirs.get("num_key_value_heads", self.kv_heads)
        ours |= {"num_heads": heads, "num_kv_heads": heads if groups is None else groups}
        ours["head_dim"] = theirs.get("head_dim", self.head_dim)

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs |= {"num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads}
        if self.head_dim is not None or model.head_width * model.num_heads != model.d_model:
            theirs["head_dim"] = model.head_width


@dataclass(frozen=True)
class MultiQuery:
    """GPT-BigCode: one key/value head, or one for each query head, d_model / num_heads wide."""

    theirs: str

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours["num_heads"] = theirs.get(self.theirs)
        ours["num_kv_heads"] = 1 if theirs.get("multi_query", True) else ours["num_heads"]

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs |= {self.theirs: model.num_heads, "multi_query": model.num_kv_heads == 1}


@dataclass(frozen=True)
class FalconBlock:
    """Heads and the order of a block, which come together: the old architecture has one key/value head or one for each
    query head, the new one (Falcon 40B) any number, and feed-forwards beside attention always."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        heads, groups = theirs.get("num_attention_heads"), theirs.get("num_kv_heads", None)
        new, beside = theirs.get("new_decoder_architecture", False), theirs.get("parallel_attn", True)
        norms, shared = theirs.get("num_ln_in_parallel_attn", None), theirs.get("multi_query", True)
        if new and not beside:
            theirs.refuse("parallel_attn", "the new decoder architecture has feed-forwards beside attention")
        if norms not in ((None, 1, 2) if new else (None, 1)):
            theirs.refuse("num_ln_in_parallel_attn", "the new decoder architecture has 1 or 2 norms, the old one has 1")
        ours["num_heads"], ours["block"] = heads, "parallel" if beside else "sequential"
        ours["num_kv_heads"] = (groups or heads) if new else 1 if shared else heads
        if new and norms != 1:
            ours["block"] = "parallel_norms"

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        two, few = model.block == "parallel_norms", model.num_kv_heads not in (1, model.num_heads)
        new = two or (few and model.block == "parallel")
        theirs |= {"num_attention_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
        theirs |= {"new_decoder_architecture": new, "multi_query": model.num_kv_heads == 1}
        theirs |= {"parallel_attn": model.block != "sequential", "num_ln_in_parallel_attn": (2 if two else 1)}


@dataclass(frozen=True)
class EveryWindow:
    """One window for all layers; switched: only where use_sliding_window is true. default: what a missing key means."""

    switched: bool = False
    default: int | None = None

    def read(self, theirs: Theirs, ours: Ours) -> None:
        window = theirs.get("sliding_window", self.default)
        if not self.switched or theirs.get("use_sliding_window", False):
            ours["attention.window"] = window

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        window = model.attention.window_of(0)
        theirs["sliding_window"] = window
        if self.switched:
            theirs["use_sliding_window"] = window is not None


@dataclass(frozen=True)
class Windows:
    """Windows layer by layer, as layer_types says. usual: of a layer's number and Theirs, whether it has a window where
    there are no layer_types. switched: only where use_sliding_window is true. default: what a missing key means."""

    usual: Callable[[int, Theirs], bool]
    switched: bool = True
    default: int = 4096

    def read(self, theirs: Theirs, ours: Ours) -> None:
        window, number = theirs.get("sliding_window", self.default), theirs.layers()
        kinds = theirs.get("layer_types", None)
        theirs.asked.add("max_window_layers")
        if self.switched and not theirs.get("use_sliding_window", False):
            window = None
        if kinds is None:
            cut = [self.usual(layer, theirs) for layer in range(number)]
        else:
            cut = [kind == "sliding_attention" for kind in kinds]
            if len(cut) != number and "num_hidden_layers" in theirs.values:
                said = theirs.values["num_hidden_layers"]
                theirs.problems.append(f"layer_types names {len(cut)} layers, but num_hidden_layers={said}")
            if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
                theirs.problems.append(f"layer_types has {', '.join(sorted(unknown))}: not known here")
        ours["attention.window"] = shortest([window if here else None for here in cut])

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        windows = [model.attention.window_of(layer) for layer in range(model.num_layers)]
        lengths = {window for window in windows if window is not None}
        theirs["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        theirs["sliding_window"] = min(lengths, default=None)
        if self.switched:
            theirs["use_sliding_window"] = bool(lengths)


def shortest(windows: list[int | None]) -> int | list[int | None] | None:
    """The shortest beginning that says the same when it is repeated: [5, null, 5, null] -> [5, null]."""
    for length in range(1, len(windows) + 1):
        if all(window == windows[layer % length] for layer, window in enumerate(windows)):
            return windows[0] if length == 1 else windows[:length]
    return None


@dataclass(frozen=True)
class AttentionExperts:
    """JetMoE: as many key/value heads as an expert has query heads, as many attention experts as feed-forward ones,
    routed in the same way."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        if theirs.get("rms_norm_eps", 1e-6) != 1e-6:
            theirs.refuse("rms_norm_eps", "the norms of JetMoE's blocks have 1e-6 always, and a model here has one")
        theirs.asked.add("num_attention_heads")
        heads = theirs.get("num_key_value_heads")
        ours |= {"num_heads": heads, "num_kv_heads": heads, "head_dim": theirs.get("kv_channels"), "norm_eps": 1e-6}
        ours |= {"attention.kind": "switch", "attention.out_bias": True, "moe.out_bias": True}
        for name in ("num_experts", "top_k", "renormalize", "renormalize_top_1", "balance_loss_coef"):
            ours[f"attention.moe.{name}"] = ours[f"moe.{name}"]

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs |= {"num_key_value_heads": model.num_heads, "num_attention_heads": model.num_heads * model.moe.top_k}
        theirs |= {"kv_channels": model.head_width, "rms_norm_eps": model.norm_eps}


@dataclass(frozen=True)
class ScoreMultiplier:
    """Granite: attention_multiplier; a missing key means 1."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours["attention.score_multiplier"] = float(theirs.get("attention_multiplier", 1.0))

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs["attention_multiplier"] = score_multiplier(model)
