"""The measurements of a point, reduced to what a report shows: a point's lines are read, summed and let go.

drop rates are kept at up to 20 fractions of the schedule; counts (loads, drops by expert, by place, by how
often the token is) are summed over the last quarter of the schedule, as drop_rate of the ledger is, or over the last
fraction where that is longer.

Legend: F fractions, L layers with experts, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_dist.study.ledger.columns import Columns, read_columns
from moe_dist.study.statistics.samples import Floats

_COUNTS = (
    "load",
    "dropped_by_expert",
    "dropped_by_place",
    "dropped_by_micro_step_place",
    "load_by_frequency",
    "dropped_by_frequency",
)

_FRACTIONS = 20
"""Of the schedule at most: those of a finer grid are averaged."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """Of one point, or of the seeds of a cell together. layers: (number, kind). drop_rate_FL: NaN where there is none.
    counts: for each name above one array a layer, without those that no line has. seeds: how many points."""

    fractions: tuple[float, ...]
    layers: tuple[tuple[int, str], ...]
    drop_rate_FL: Floats
    counts: dict[str, tuple[Floats, ...]]
    seeds: int = 1

    def over_layers(self, name: str) -> Floats | None:
        """A count that has the same parts in all layers, summed over them."""
        return None if name not in self.counts else np.sum(self.counts[name], axis=0)


def reduce_points(paths: Sequence[Path]) -> Reduced | None:
    """Of the points of a cell whose measurements are there; None of none, or where they have not the same layers.
    Raises ValueError for a file that cannot be read."""
    found = [one for path in paths if path.exists() and (one := reduce_columns(read_columns(path))) is not None]
    if not found or len({(one.layers, one.fractions, tuple(one.counts)) for one in found}) > 1:
        return None
    counts = {
        name: tuple(np.sum(parts, axis=0) for parts in zip(*(one.counts[name] for one in found), strict=True))
        for name in found[0].counts
    }
    rates_FL = np.mean([one.drop_rate_FL for one in found], axis=0)
    return Reduced(found[0].fractions, found[0].layers, rates_FL, counts, len(found))


def reduce_columns(columns: Columns) -> Reduced | None:
    """None where no layer has experts."""
    if not columns.layers:
        return None
    fractions_F = columns.model["fraction"]
    late_F = fractions_F > 0.75 + 1e-9
    late_F[-1] = True
    layers, rates = [], []
    counts: dict[str, list[Floats]] = {}
    for kind, arrays in columns.layers.items():
        layers += [(int(number), kind) for number in arrays["layer"]]
        rates.append(arrays["drop_rate"])
        for name in _COUNTS:
            if name in arrays and arrays[name].ndim == 3:
                counts.setdefault(name, []).extend(arrays[name][late_F].sum(0).astype(np.float64))
    rates_FL = np.concatenate(rates, axis=1)
    if len(fractions_F) > _FRACTIONS:
        parts_F = np.array_split(np.arange(len(fractions_F)), _FRACTIONS)
        rates_FL = np.stack([rates_FL[part].mean(0) for part in parts_F])
        fractions_F = np.array([fractions_F[part[-1]] for part in parts_F])
    whole = {name: tuple(parts) for name, parts in counts.items() if len(parts) == len(layers)}
    return Reduced(tuple(map(float, fractions_F)), tuple(layers), rates_FL, whole)


def layer_name(layer: tuple[int, str]) -> str:
    number, kind = layer
    return f"layer {number}" if kind == "feed_forward" else f"layer {number} {kind.replace('_', ' ')}"
