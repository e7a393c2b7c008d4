"""The measurements of a point, reduced to what a report shows: a point's lines are read, summed and let go.

drop rates and entropies are kept at every fraction of the schedule; counts (loads, drops by expert, by place, by how
often the token is) are summed over the last quarter of the schedule, as drop_rate of the ledger is, or over the last
fraction where that is longer.

Legend: F fractions, L layers with experts, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.study.measurements import read_measurements
from moe_dist.study.statistics.samples import Floats

_COUNTS = (
    "load",
    "dropped_by_expert",
    "dropped_by_place",
    "dropped_by_micro_step_place",
    "load_by_frequency",
    "dropped_by_frequency",
)


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
    """Of the points of a cell whose measurements are there; None of none, or where they have not the same layers."""
    found = [one for path in paths if path.exists() and (one := reduce_lines(read_measurements(path))) is not None]
    if not found or len({(one.layers, one.fractions, tuple(one.counts)) for one in found}) > 1:
        return None
    counts = {
        name: tuple(np.sum(parts, axis=0) for parts in zip(*(one.counts[name] for one in found), strict=True))
        for name in found[0].counts
    }
    rates_FL = np.mean([one.drop_rate_FL for one in found], axis=0)
    return Reduced(found[0].fractions, found[0].layers, rates_FL, counts, len(found))


def reduce_lines(lines: Sequence[dict[str, Any]]) -> Reduced | None:
    """None where no layer has experts."""
    by_layer: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["layer"] is not None:
            by_layer.setdefault((line["layer"], line["kind"]), []).append(line)
    if not by_layer:
        return None
    fractions = tuple(sorted({line["fraction"] for members in by_layer.values() for line in members}))
    at = {fraction: number for number, fraction in enumerate(fractions)}
    late = {fraction for fraction in fractions if fraction > 0.75 + 1e-9} or {fractions[-1]}
    rates_FL = np.full((len(fractions), len(by_layer)), np.nan)
    counts: dict[str, list[Floats]] = {}
    for column, members in enumerate(by_layer.values()):
        for line in members:
            if line.get("drop_rate") is not None:
                rates_FL[at[line["fraction"]], column] = line["drop_rate"]
        last = [line for line in members if line["fraction"] in late]
        for name in _COUNTS:
            if last and all(line.get(name) is not None for line in last):
                counts.setdefault(name, []).append(np.array([line[name] for line in last], dtype=np.float64).sum(0))
    whole = {name: tuple(parts) for name, parts in counts.items() if len(parts) == len(by_layer)}
    return Reduced(fractions, tuple(by_layer), rates_FL, whole)


def layer_name(layer: tuple[int, str]) -> str:
    number, kind = layer
    return f"layer {number}" if kind == "feed_forward" else f"layer {number} {kind.replace('_', ' ')}"
