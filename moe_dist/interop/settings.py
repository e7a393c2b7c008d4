"""What each setting of a Hugging Face config.json is called here, in both directions.

A Rule reads some of their keys into fields of ours, and writes fields as keys. What a rule cannot say it leaves to
meaning.py: an export reads back what it wrote, and every field that decides logits must come out as it was.

Fields of ours go by their path within the model: "norm_eps", "attention.window", "moe.top_k".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.config.rules.model import MOST_LAYERS
from moe_dist.config.rules.parts import shown
from moe_dist.moe.experts import expert_widths

REQUIRED = object()


class Theirs:
    """A config.json that is being read: what was asked for, and what is wrong with it, a line each."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.asked: set[str] = set()
        self.problems: list[str] = []

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """default: what a missing key means; REQUIRED: a problem, as null is then."""
        self.asked.add(key)
        value = self.values.get(key, default)
        if default is REQUIRED and value in (REQUIRED, None):
            self.problems.append(f"config.json has no {key}")
            return 1
        return value

    def layers(self) -> int:
        """Of which lists are made: no more than a model here can have, which is said by its own rules."""
        return min(int(self.get("num_hidden_layers")), MOST_LAYERS)

    def refuse(self, key: str, why: str) -> None:
        self.problems.append(f"{key}={shown(self.values.get(key))}: {why}")


Ours = dict[str, Any]


class Rule(Protocol):
    def read(self, theirs: Theirs, ours: Ours) -> None: ...

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Key:
    """One of theirs is one of ours, or several that are always equal there. Where versions of Transformers call it by
    several names, any is read and all are written."""

    theirs: str
    ours: str
    default: Any = REQUIRED

    def read(self, theirs: Theirs, ours: Ours) -> None:
        names = self.theirs.split()
        value = theirs.get(next((name for name in names if name in theirs.values), names[0]), self.default)
        theirs.asked |= set(names)
        for path in self.ours.split():
            ours[path] = value

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        for name in self.theirs.split():
            theirs[name] = value_at(model, self.ours.split()[0])


@dataclass(frozen=True)
class Fixed:
    """What a family always has, and no key says."""

    values: Mapping[str, Any]

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours.update(self.values)

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Only:
    """Their key, at the one value that a model here can have; also what a missing key means."""

    theirs: str
    value: Any
    why: str

    def read(self, theirs: Theirs, ours: Ours) -> None:
        if theirs.get(self.theirs, self.value) != self.value:
            theirs.refuse(self.theirs, self.why)

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = self.value


@dataclass(frozen=True)
class FourFold:
    """Hidden width of a feed-forward; null, or a missing key, means four times the key `width`."""

    theirs: str
    width: str

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours["d_ff"] = theirs.get(self.theirs, None) or 4 * theirs.get(self.width)

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = model.d_ff


@dataclass(frozen=True)
class Choice:
    """A word of theirs, or a switch, is a word of ours. default: what a missing key means."""

    theirs: str
    ours: str
    words: Mapping[Any, Any]
    default: Any

    def read(self, theirs: Theirs, ours: Ours) -> None:
        word = theirs.get(self.theirs, self.default)
        if word not in self.words:
            theirs.refuse(self.theirs, f"known here are {', '.join(map(shown, self.words))}")
        ours[self.ours] = self.words.get(word, self.words[self.default])

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        value = value_at(model, self.ours)
        theirs[self.theirs] = next((word for word, own in self.words.items() if own == value), self.default)


@dataclass(frozen=True)
class FirstDense:
    """The first so many layers are dense, all others have experts."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours["moe.first"] = theirs.get("first_k_dense_replace", 1)

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs["first_k_dense_replace"] = model.moe.first_layer


@dataclass(frozen=True)
class SparseStep:
    """Every nth layer has experts, but for those of mlp_only_layers."""

    def read(self, theirs: Theirs, ours: Ours) -> None:
        number, step = theirs.layers(), theirs.get("decoder_sparse_step", 1)
        dense = theirs.get("mlp_only_layers", None) or []
        layers = [layer for layer in range(number) if (layer + 1) % step == 0 and layer not in dense]
        if not layers:
            theirs.problems.append(f"decoder_sparse_step={step}, mlp_only_layers={dense}: no layer has experts")
            return
        first, every = layers[0], layers[1] - layers[0] if len(layers) > 1 else number
        if layers != list(range(first, number, every)):
            theirs.problems.append(f"mlp_only_layers={dense}: layers with experts must be a first one and each nth on")
        ours |= {"moe.first": first, "moe.every": every}

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        layers = set(model.moe.layers(model.num_layers))
        dense = [layer for layer in range(model.num_layers) if layer not in layers]
        theirs |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}


@dataclass(frozen=True)
class TopK:
    """How many experts, and whether their weights are divided by their sum: theirs, or always where that is None."""

    norm: str | None = None
    default: bool = True

    def read(self, theirs: Theirs, ours: Ours) -> None:
        top_k = theirs.get("num_experts_per_tok")
        norm = self.default if self.norm is None else theirs.get(self.norm, self.default)
        ours["moe.top_k"] = top_k
        ours["moe.renormalize"] = norm or top_k == 1
        ours["moe.renormalize_top_1"] = norm and top_k == 1

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs["num_experts_per_tok"] = model.moe.top_k
        if self.norm is not None:
            theirs[self.norm] = model.moe.renormalizes


@dataclass(frozen=True)
class Width:
    """Hidden width of an expert. also_dense: it is that of a dense feed-forward too, where no layer has one."""

    theirs: str
    also_dense: bool = False

    def read(self, theirs: Theirs, ours: Ours) -> None:
        ours["moe.d_ff"] = theirs.get(self.theirs)
        if self.also_dense:
            ours["d_ff"] = ours["moe.d_ff"]

    def write(self, model: ModelConfig, theirs: dict[str, Any]) -> None:
        theirs[self.theirs] = expert_widths(model.moe, model.d_ff)[0] if model.moe.num_experts else model.d_ff


def value_at(model: ModelConfig, path: str) -> Any:
    at: Any = model
    for name in path.split("."):
        at = getattr(at, name)
    return at


def model_of(ours: Ours) -> ModelConfig:
    """From fields by their paths. Nothing is dropped, and no z-loss asked for: theirs have neither."""
    parts: dict[str, dict[str, Any]] = {"": {}, "attention.": {}, "moe.": {}, "attention.moe.": {}}
    for path, value in ours.items():
        home, _, name = path.rpartition(".")
        parts[home + "." if home else ""][name] = value
    usual: dict[str, Any] = dict(capacity_factor=None, z_loss_coef=0.0)
    dense = "num_experts" not in parts["moe."]
    moe = MoEConfig(num_experts=0) if dense else MoEConfig(**(usual | parts["moe."]))
    if parts["attention.moe."]:
        parts["attention."]["moe"] = MoEConfig(**(usual | parts["attention.moe."]))
    return ModelConfig(attention=AttentionConfig(**parts["attention."]), moe=moe, **parts[""])


Rules = Sequence[Rule]
