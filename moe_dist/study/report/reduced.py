"""The measurements of a point, reduced to what a report shows: a point's lines are read, summed and let go.

drop rates are kept at up to 20 fractions of the schedule; counts (loads, drops by expert, by place, by how
often the token is) are summed over the fractions that lie in the last quarter of the schedule, as drop_rate of the
ledger is, or over the last fraction where that is longer. `late` says over how much.

Every seed has other popular experts, so numbers by expert are never added up over seeds: `load` and `dropped_by_expert`
are of one point alone, and of several there is `ranked_load`, from each seed's fullest expert to its emptiest.

Legend: F fractions, L layers with experts, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_dist.study.ledger.columns import Columns, read_columns
from moe_dist.study.statistics.samples import Floats

_BY_EXPERT = ("load", "dropped_by_expert")
_COUNTS = (
    *_BY_EXPERT,
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
    counts: for each name above, and ranked_load, one array a layer, without those that no line has. late: the share of
    the schedule that they are of, 0 to 1. seeds: how many points."""

    fractions: tuple[float, ...]
    layers: tuple[tuple[int, str], ...]
    drop_rate_FL: Floats
    counts: dict[str, tuple[Floats, ...]]
    late: float
    seeds: int = 1

    def over_layers(self, name: str) -> Floats | None:
        """A count that has the same parts in all layers, summed over them."""
        return None if name not in self.counts else np.sum(self.counts[name], axis=0)


def reduce_points(paths: Sequence[Path]) -> list[Reduced]:
    """Of each point whose measurements are there and have layers with experts. Raises ValueError for a file that cannot
    be read."""
    read = (reduce_columns(read_columns(path)) for path in paths if path.exists())
    return [one for one in read if one is not None]


def together(points: Sequence[Reduced]) -> Reduced:
    """The seeds of a cell, one at least: means of rates, sums of counts. Raises ValueError where they were measured at
    other fractions, or have other layers or counts."""
    first = points[0]
    for what, values in (
        ("fractions of the schedule", {one.fractions for one in points}),
        ("layers", {one.layers for one in points}),
        ("counts", {tuple(one.counts) for one in points}),
    ):
        if len(values) > 1:
            raise ValueError(f"its seeds have measurements of other {what}")
    counts = {
        name: tuple(np.sum(parts, axis=0) for parts in zip(*(one.counts[name] for one in points), strict=True))
        for name in first.counts
        if name not in _BY_EXPERT
    }
    rates_FL = np.mean([one.drop_rate_FL for one in points], axis=0)
    return Reduced(first.fractions, first.layers, rates_FL, counts, first.late, len(points))


def reduce_columns(columns: Columns) -> Reduced | None:
    """None where no layer has experts."""
    if not columns.layers:
        return None
    fractions_F = columns.model["fraction"]
    begins_F = np.concatenate(([0.0], fractions_F[:-1]))
    late_F = begins_F > 0.75 - 1e-9
    late_F[-1] = True
    layers, rates = [], []
    counts: dict[str, list[Floats]] = {}
    for kind, arrays in columns.layers.items():
        layers += [(int(number), kind) for number in arrays["layer"]]
        rates.append(arrays["drop_rate"])
        for name in _COUNTS:
            if name in arrays and arrays[name].ndim == 3:
                counts.setdefault(name, []).extend(arrays[name][late_F].sum(0).astype(np.float64))
    if "load" in counts:
        counts["ranked_load"] = [np.sort(load_E)[::-1] for load_E in counts["load"]]
    rates_FL = np.concatenate(rates, axis=1)
    late = float(fractions_F[-1] - begins_F[late_F.argmax()])
    if len(fractions_F) > _FRACTIONS:
        parts_F = np.array_split(np.arange(len(fractions_F)), _FRACTIONS)
        rates_FL = np.stack([rates_FL[part].mean(0) for part in parts_F])
        fractions_F = np.array([fractions_F[part[-1]] for part in parts_F])
    whole = {name: tuple(parts) for name, parts in counts.items() if len(parts) == len(layers)}
    return Reduced(tuple(map(float, fractions_F)), tuple(layers), rates_FL, whole, late)


def late_in_words(cells: Iterable[Reduced]) -> str:
    """'the last 25% of the schedule'"""
    shares = list(dict.fromkeys(f"{one.late:.0%}" for one in sorted(cells, key=lambda one: one.late)))
    ends = shares if len(shares) == 1 else [shares[0], shares[-1]]
    return f"the last {' to '.join(ends)} of the schedule"


def layer_name(layer: tuple[int, str]) -> str:
    number, kind = layer
    return f"layer {number}" if kind == "feed_forward" else f"layer {number} {kind.replace('_', ' ')}"
