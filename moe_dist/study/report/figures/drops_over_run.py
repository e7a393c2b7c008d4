"""The drop rate of each layer over the run, at fractions of the schedule."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from moe_dist.study.page.model import Figure
from moe_dist.study.page.theme import svg_of
from moe_dist.study.report.figures.canvas import (
    LINES,
    PANELS,
    left_out,
    legend,
    look,
    name_panel,
    panel_rows,
    panels,
    spread_over,
)
from moe_dist.study.report.reduced import Reduced, layer_name


def drops_over_run(cells: Mapping[str, Reduced]) -> Figure:
    """cells: name -> the mean over its seeds."""
    shown = spread_over(list(cells), PANELS)
    with panels(*panel_rows(len(shown), 3)) as (figure, grid):
        every = [axes for row in grid for axes in row]
        top = max(float(np.nanmax(cells[name].drop_rate_FL)) for name in shown)
        for axes, name in zip(every, shown, strict=False):
            _draw(axes, cells[name])
            name_panel(axes, name)
            axes.set_ylim(0, max(100 * top * 1.05, 0.1))
        for axes in every[len(shown) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("assignments dropped (%)")
        legend(figure, every[0])
        svg = svg_of(figure)
    layers = max(len(one.layers) for one in cells.values())
    return Figure(
        name="drops-over-run",
        title="Drop rate by layer over the run",
        caption="Mean over seeds of the steps since the fraction before."
        + left_out(len(shown), len(cells), "points")
        + left_out(min(LINES, layers), layers, "layers"),
        svg=svg,
        columns=["point", "layer", "fraction", "drop_rate"],
        rows=[
            [name, layer_name(layer), fraction, None if rate != rate else rate]
            for name, one in cells.items()
            for layer, rates in zip(one.layers, one.drop_rate_FL.T.tolist(), strict=True)
            for fraction, rate in zip(one.fractions, rates, strict=True)
        ],
    )


def _draw(axes: Axes, one: Reduced) -> None:
    for number, column in enumerate(spread_over(range(len(one.layers)), LINES)):
        color, marker = look(number)
        axes.plot(
            one.fractions,
            100 * one.drop_rate_FL[:, column],
            color=color,
            marker=marker if len(one.fractions) <= 20 else None,
            label=layer_name(one.layers[column]),
        )
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("fraction of the schedule")
