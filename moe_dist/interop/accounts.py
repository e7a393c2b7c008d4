"""Every tensor accounted for: what a folder must hold, what it lacks, has too much of, or in another shape."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from moe_dist.config.model import ModelConfig
from moe_dist.engine.base import logical_shapes
from moe_dist.interop.families import Family
from moe_dist.interop.folder import Weights
from moe_dist.interop.names import Pair, Place, pairs, shapes_of_theirs
from moe_dist.models.backends import plainest
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh

_MOST_LINES = 20


class Table:
    """The pairs of a model of `family`, with the shapes of both sides and the names of buffers, which no optimizer
    holds. Raises ValueError for tensors of ours that the family does not have."""

    def __init__(self, family: Family, model: ModelConfig) -> None:
        with torch.device("meta"):
            built = Decoder(plainest(model), single_process_mesh())
        self.heads = model.head_sizes
        self.shapes: dict[str, list[int]] = dict(sorted(logical_shapes(built).items()))
        self.buffers = sorted(name for name, _ in built.named_buffers())
        self.pairs: list[Pair] = pairs(family.rows_of(model), self.shapes, model.num_layers)
        self.theirs = shapes_of_theirs(self.pairs, self.shapes, self.heads)


def account(weights: Weights, table: Table, tied: bool, leave_out: Sequence[str]) -> list[str]:
    """Notes on what is left out on purpose, names like `leave_out`. tied: the output projection is the embedding, and
    may be stored a second time.

    Raises ValueError with a line for each name that is missing, left over or of another shape.
    """
    there = weights.names()
    out = [name for name in there if any(fnmatchcase(name, pattern) for pattern in leave_out)]
    extra = set(there) - table.theirs.keys() - set(out)
    if tied and "lm_head.weight" in extra and _twice(weights, table):
        extra.discard("lm_head.weight")
    problems = [f"{name} is missing" for name in table.theirs if name not in there]
    problems += [f"{name} {list(weights.shape(name))} is left over: it belongs to nothing" for name in sorted(extra)]
    problems += _misshapen(weights, table.theirs, there)
    wanted = [name for name in out if name in table.theirs]
    problems += [f"{name} cannot be left out: the model needs it" for name in wanted]
    if problems:
        more = [f"... and {len(problems) - _MOST_LINES} more"] if len(problems) > _MOST_LINES else []
        raise ValueError("\n".join(f"{weights.folder}: {line}" for line in problems[:_MOST_LINES] + more))
    return [f"left out, as asked: {len(out)} tensors, {out[0]} to {out[-1]}"] if out else []


def _misshapen(weights: Weights, expected: Mapping[str, tuple[int, ...]], there: Sequence[str]) -> list[str]:
    held = set(there)
    return [
        f"{name} has shape {list(weights.shape(name))}, but the configuration says {list(shape)}"
        for name, shape in expected.items()
        if name in held and weights.shape(name) != shape
    ]


def _twice(weights: Weights, table: Table) -> bool:
    embedding = next(pair.theirs[0] for pair in table.pairs if pair.ours[0].name == "embedding.weight")
    there = embedding.name in weights.names()
    return there and torch.equal(weights.read(embedding), weights.read(Place("lm_head.weight")))
