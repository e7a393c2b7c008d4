"""The figure of a study: validation loss, a classifier's accuracy, and drop rate against the capacity factor, with the
spread over seeds.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_dist.study.grid import Scalar, axis_names, in_words, show
from moe_dist.study.measure import loss_unit

if TYPE_CHECKING:
    from moe_dist.study.cells import Cell

# Okabe and Ito's colours, told apart with any colour vision; and a marker each, for print in grey.
_STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P")]

Curve = list[tuple[float, dict[int, float]]]
"""(place on the x axis, seed -> value), from left to right."""

_SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "svg.hashsalt": "moe_dist",  # else the names inside the file are random
}


def draw(grid: Sequence["Cell"], x_axis: str, files: Sequence[Path]) -> None:
    """One line for each combination of the other axes: a dot a seed, the line their mean, the band least to most.

    Thin lines join the dots of one seed, where all its runs have finished. The same cells give the same bytes.
    """
    places = x_places([cell.axes[x_axis] for cell in grid])
    unit = " or ".join(dict.fromkeys(loss_unit(record) for cell in grid for record in cell.records))
    panels = [
        ("validation_loss", f"dropless validation loss ({unit})", 1.0),
        ("validation_accuracy", "dropless validation accuracy (%)", 100.0),
        ("drop_rate", "assignments dropped at the end (%)", 100.0),
    ]
    panels = [panel for panel in panels if panel[0] != "validation_accuracy" or any(c.values(panel[0]) for c in grid)]
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(3.7 * len(panels), 3.1), layout="constrained", dpi=160)
        for axes, (field, title, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for number, (name, cells) in enumerate(_series(grid, x_axis).items()):
                known = [(places[cell.axes[x_axis]], cell.by_seed(field, scale)) for cell in cells]
                curve = sorted(((x, values) for x, values in known if values), key=lambda point: point[0])
                _line(axes, curve, places.get(None), _STYLES[number % len(_STYLES)], name)
            _label(axes, x_axis, places, title)
            if field == "drop_rate":
                axes.set_ylim(bottom=0)
        if len(_series(grid, x_axis)) > 1:
            figure.axes[0].legend(frameon=False)
        for path in files:
            undated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
            figure.savefig(path, metadata=undated)


def x_places(values: Sequence[Scalar]) -> dict[Scalar, float]:
    """Where each value stands: numbers at themselves and null (dropless) one step to their right, or all in order."""
    distinct = list(dict.fromkeys(values))
    numbers = sorted(value for value in distinct if isinstance(value, int | float) and not isinstance(value, bool))
    if not numbers or len(numbers) + (None in distinct) < len(distinct):
        return {value: float(place) for place, value in enumerate(distinct)}
    gaps = [right - left for left, right in pairwise(numbers)]
    places: dict[Scalar, float] = {number: float(number) for number in numbers}
    if None in distinct:
        places[None] = numbers[-1] + (fmean(gaps) if gaps else 1.0)
    return places


def _series(grid: Sequence["Cell"], x_axis: str) -> dict[str, list["Cell"]]:
    names = axis_names(list(grid[0].axes))
    series: dict[str, list[Cell]] = {}
    for cell in grid:
        rest = in_words({key: value for key, value in cell.axes.items() if key != x_axis}, names)
        series.setdefault(rest, []).append(cell)
    return series


def _line(axes: Axes, curve: Curve, beyond: float | None, style: tuple[str, str], name: str) -> None:
    """Mean line, band and dots. The place `beyond` (no capacity at all) is reached by a dotted line, without a band."""
    color, marker = style
    capped = [(x, list(values.values())) for x, values in curve if x != beyond]
    places = [x for x, _ in capped]
    axes.plot(places, [fmean(values) for _, values in capped], color=color, linewidth=1.6, label=name)
    low, high = [min(values) for _, values in capped], [max(values) for _, values in capped]
    axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
    if 0 < len(capped) < len(curve):
        (x, values), (end, without) = capped[-1], curve[-1]
        means = [fmean(values), fmean(without.values())]
        axes.plot([x, end], means, color=color, linewidth=1.2, linestyle=(0, (2, 2)))
    xs = [x for x, _ in curve]
    for seed in curve[0][1] if curve else ():
        if all(seed in values for _, values in curve):
            axes.plot(xs, [values[seed] for _, values in curve], color=color, linewidth=0.6, alpha=0.5)
    for x, values in ((x, list(values.values())) for x, values in curve):
        axes.plot(x, fmean(values), color=color, marker="_", markersize=12, markeredgewidth=1.6)
        axes.plot(
            [x] * len(values), values, marker, color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.6
        )


def _label(axes: Axes, x_axis: str, places: dict[Scalar, float], title: str) -> None:
    name = x_axis.split(".")[-1].replace("_", " ")
    ticks = {
        place: "dropless" if value is None and "capacity" in x_axis else show(value) for value, place in places.items()
    }
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(name)
    axes.set_ylabel(title)
    axes.margins(x=0.08)
