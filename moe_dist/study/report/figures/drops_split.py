"""Measured drops beside theory, by layer: what chance explains, what the experts' unequal shares add, and the rest.

Each seed is split by its own shares, then the parts are averaged: every seed has other popular experts, whose shares
added up by number would look even.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from moe_dist.study.page.model import Figure
from moe_dist.study.page.theme import svg_of
from moe_dist.study.report.figures.canvas import (
    PANELS,
    from_zero,
    left_out,
    legend,
    look,
    name_panel,
    panel_rows,
    panels,
    spread_over,
)
from moe_dist.study.report.reduced import Reduced, layer_name
from moe_dist.study.report.theory import Competition
from moe_dist.study.statistics.drops import DropSplit, split_drops


@dataclass(frozen=True, slots=True)
class LayerSplit:
    layer: str
    split: DropSplit


def split_layers(points: Sequence[Reduced], of: Competition) -> list[LayerSplit]:
    """Of the feed-forward layers of a cell whose experts were asked for anything: means over its points, of which each
    is one seed."""
    by_layer: dict[str, list[DropSplit]] = {}
    for one in points:
        for name, split in _split(one, of):
            by_layer.setdefault(name, []).append(split)
    return [LayerSplit(name, _mean(splits)) for name, splits in by_layer.items()]


def _split(one: Reduced, of: Competition) -> Iterator[tuple[str, DropSplit]]:
    loads, dropped = one.counts.get("load", ()), one.counts.get("dropped_by_expert", ())
    for layer, load_E, dropped_E in zip(one.layers, loads, dropped, strict=False):
        if layer[1] != "feed_forward" or load_E.sum() == 0:
            continue
        shares = load_E / load_E.sum()
        measured = float(dropped_E.sum() / load_E.sum())
        yield layer_name(layer), split_drops(measured, of.tokens, of.top_k, list(shares), of.capacity, of.pool)


def _mean(splits: Sequence[DropSplit]) -> DropSplit:
    return DropSplit(
        fmean(each.measured for each in splits),
        fmean(each.chance for each in splits),
        fmean(each.imbalance for each in splits),
        fmean(each.rest for each in splits),
    )


def drops_split(cells: Mapping[str, Sequence[LayerSplit]], late: str) -> Figure:
    """cells: name -> its layers. late: over what they were measured, in words."""
    shown = spread_over(list(cells), PANELS)
    with panels(*panel_rows(len(shown), 3)) as (figure, grid):
        every = [axes for row in grid for axes in row]
        for axes, name in zip(every, shown, strict=False):
            _draw(axes, cells[name])
            name_panel(axes, name)
        for axes in every[len(shown) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("assignments dropped (%)")
        legend(figure, every[0])
        svg = svg_of(figure)
    return Figure(
        name="drops-split",
        title="Chance, imbalance and what was measured, by layer",
        caption="Chance: what uniform random routing would drop. Imbalance: what random routing with the measured "
        "shares of the experts adds. The mark is what was dropped; what it has beyond the bar, random routing does not "
        f"explain. All over {late}; each seed is split by its own shares, then seeds are averaged."
        + left_out(len(shown), len(cells), "points"),
        svg=svg,
        columns=["point", "layer", "measured", "chance", "imbalance", "rest"],
        rows=[
            [name, each.layer, each.split.measured, each.split.chance, each.split.imbalance, each.split.rest]
            for name, layers in cells.items()
            for each in layers
        ],
    )


def _draw(axes: Axes, layers: Sequence[LayerSplit]) -> None:
    places = np.arange(len(layers))
    chance = 100 * np.array([each.split.chance for each in layers])
    imbalance = 100 * np.array([each.split.imbalance for each in layers])
    axes.bar(places, chance, color=look(0)[0], width=0.6, label="chance")
    axes.bar(places, imbalance, bottom=chance, color=look(4)[0], width=0.6, label="imbalance")
    measured = [100 * each.split.measured for each in layers]
    axes.plot(places, measured, linestyle="none", marker="D", color=look(1)[0], label="measured")
    ticks = spread_over(range(len(layers)), 8)
    axes.set_xticks(ticks, [layers[at].layer.removeprefix("layer ") for at in ticks])
    axes.set_xlabel("layer")
    from_zero(axes)
