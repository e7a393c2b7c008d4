"""Which parameters a rank holds, in any layout, from sizes alone.

A model is a first part, blocks of at most two kinds, and a last part. So one of each kind is built, on the device meta
and on the mesh that the rank would have, and asked what it holds; the blocks of a kind hold the same. That is exact,
whatever the layers are made of, and takes milliseconds however deep the model is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from moe_dist.config import Config
from moe_dist.config.model import ModelConfig
from moe_dist.models.block import is_moe_layer
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.freezing import matches, nothing_left
from moe_dist.parallel.mesh import Axis, Layout, mesh_without_processes
from moe_dist.parallel.sharding import logical_parameters

BLOCKS = "blocks."


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter of a rank, whole: before ZeRO cuts it. expert: over edp instead of dp. decay: which of the
    optimizer's groups it is in. trained: not frozen by train.freeze, or it is in none."""

    name: str
    elements: int
    expert: bool = False
    decay: bool = True
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Param:
    """The same with what ZeRO asks of it, whose it is and where in the model. block: number of its block; -1 before the
    blocks, their number behind them."""

    numel: int
    expert: bool
    decay: bool
    block: int

    @property
    def axis(self) -> Axis:
        """Over which its gradient is reduced."""
        return "edp" if self.expert else "dp"


@dataclass(frozen=True)
class Held:
    """The parameters of a rank, in the order of the model. What is asked of it often is worked out once."""

    tensors: tuple[Tensor, ...]

    @staticmethod
    def by(model: nn.Module) -> "Held":
        """What this rank holds of a model, which may be on the meta device."""
        return Held(
            tuple(
                # Whole ones, under ZeRO-3.
                Tensor(
                    name,
                    getattr(param, "ds_numel", param.numel()),
                    spec.shard == "expert",
                    spec.decay,
                    param.requires_grad,
                )
                for name, param, spec in logical_parameters(model)
            )
        )

    @staticmethod
    def of(config: Config, layout: Layout, rank: int = 0) -> "Held":
        """What `rank` would hold. Raises ValueError where the model cannot be cut so."""
        model, max_len = config.model, None
        if config.task == "classification":
            # Labels are counted in the data; two are the least, and few beside everything else.
            model, max_len = replace(model, num_classes=model.num_classes or 2), config.train.seq_len
        tied = max_len is None and model.tie_embeddings
        model = _on_any_machine(model, layout.expert_ranks)
        held, patterns = _held(_Question(repr(model), model, layout, rank, max_len)), config.train.freeze
        if not patterns:
            return held
        held = Held(tuple(replace(t, trained=not _matches(t.name, patterns, tied)) for t in held.tensors))
        if not held.trained.tensors:
            raise nothing_left(patterns, len(held.tensors))
        return held

    @cached_property
    def trained(self) -> "Held":
        """Those with gradients and moments."""
        kept = tuple(tensor for tensor in self.tensors if tensor.trained)
        return self if len(kept) == len(self.tensors) else Held(kept)

    @cached_property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @cached_property
    def dense(self) -> int:
        """Elements that dp replicates."""
        return sum(tensor.elements for tensor in self.tensors if not tensor.expert)

    @property
    def expert(self) -> int:
        """Elements that edp replicates."""
        return self.elements - self.dense

    def groups(self) -> list[tuple[bool, list[int]]]:
        """(whether of experts, elements of each tensor) of the optimizer's groups: with and without weight decay, each
        of them dense and of experts; what is frozen is in none."""
        kinds = [(decay, expert) for decay in (True, False) for expert in (False, True)]
        found = [
            (expert, [t.elements for t in self.trained.tensors if (t.decay, t.expert) == (decay, expert)])
            for decay, expert in kinds
        ]
        return [(expert, sizes) for expert, sizes in found if sizes]

    @cached_property
    def params(self) -> list[Param]:
        """All of them, in this order."""
        numbers = {home: int(home.removeprefix(BLOCKS)) for home in self._homes if home}
        last = max(numbers.values(), default=-1) + 1
        return [
            Param(t.elements, t.expert, t.decay, numbers.get(_home(t.name), _outside(t.name, last)))
            for t in self.tensors
        ]

    def within(self, *prefixes: str) -> int:
        """Elements of the parameters whose names begin so: of one block, or none of a block."""
        where = {_home(prefix) for prefix in prefixes}
        tensors = [tensor for home in where for tensor in self._homes.get(home, ())]
        return sum(tensor.elements for tensor in tensors if tensor.name.startswith(prefixes))

    @cached_property
    def _homes(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            found.setdefault(_home(tensor.name), []).append(tensor)
        return found


def _home(name: str) -> str:
    """The block of a parameter; that of all others is ""."""
    return ".".join(name.split(".", 2)[:2]) if name.startswith(BLOCKS) else ""


def _outside(name: str, behind: int) -> int:
    """The place of a parameter of no block."""
    return -1 if name.partition(".")[0] in ("embedding", "positions") else behind


def _matches(name: str, patterns: Sequence[str], tied: bool) -> bool:
    """Whether train.freeze names it; a tied embedding is the output projection too."""
    return matches(name, patterns) or (tied and name == "embedding.weight" and matches("output.weight", patterns))


@dataclass(frozen=True, slots=True)
class _Question:
    """What is remembered of a model, by `said`: a ModelConfig can be changed, so it is no key itself."""

    said: str
    model: ModelConfig = field(compare=False)
    layout: Layout
    rank: int
    max_len: int | None


@lru_cache(maxsize=1024)
def _held(asked: _Question) -> Held:
    model = asked.model
    kinds = [is_moe_layer(model, layer) for layer in range(model.num_layers)]
    examples = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
    small = replace(model, num_layers=max(examples.values(), default=-1) + 1)
    mesh = mesh_without_processes(replace(asked.layout, node_size=None), asked.rank)
    with torch.device("meta"):
        built: nn.Module = Decoder(small, mesh) if asked.max_len is None else Classifier(small, mesh, asked.max_len)
    return Held(tuple(_repeated(Held.by(built).tensors, kinds, examples)))


def _on_any_machine(model: ModelConfig, expert_ranks: int) -> ModelConfig:
    """With backends that can be built everywhere: parameters do not hang on them, nor on how rows travel."""
    dispatch = "local" if expert_ranks == 1 else "all_to_all"
    anywhere: dict[str, Any] = dict(dispatch=dispatch, wire="ragged", wire_dtype="same", experts="loop")
    anywhere |= dict(overlap_chunks=1, capacity_factor=None, capacity_schedule={}, eval_capacity_factor=None)
    moe, of_attention = (replace(each, **anywhere) for each in (model.moe, model.attention.moe))
    attention = replace(model.attention, backend="torch", moe=of_attention)
    return replace(model, attention=attention, kernels="torch", recompute="none", moe=moe)


def _repeated(tensors: tuple[Tensor, ...], kinds: list[bool], examples: dict[bool, int]) -> Iterator[Tensor]:
    of_block: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.name.startswith(BLOCKS):
            of_block.setdefault(int(tensor.name.split(".")[1]), []).append(tensor)
    first = next((i for i, tensor in enumerate(tensors) if tensor.name.startswith(BLOCKS)), len(tensors))
    last = first + sum(map(len, of_block.values()))
    yield from tensors[:first]
    for layer, kind in enumerate(kinds):
        example = examples[kind]
        for tensor in of_block[example]:
            rest = tensor.name.removeprefix(f"{BLOCKS}{example}.")
            yield replace(tensor, name=f"{BLOCKS}{layer}.{rest}")
    yield from tensors[last:]
