"""How many assignments the experts of each layer are asked for, over the mean, from the fullest expert down."""

from collections.abc import Mapping

import numpy as np

from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import heat_map, svg_of
from moe_dist.study.report.figures.canvas import PANELS, left_out, name_panel, panel_rows, panels, spread_over
from moe_dist.study.report.reduced import Reduced, late_in_words, layer_name
from moe_dist.study.statistics.samples import Floats

_SQUARES = 3000
"""Each is a shape of its own in the page."""


def loads(cells: Mapping[str, Reduced]) -> Figure:
    squares = max(sum(len(load_E) for load_E in one.counts["ranked_load"]) for one in cells.values())
    shown = spread_over(list(cells), max(2, min(PANELS, _SQUARES // squares)))
    over_mean = {name: over_means(one) for name, one in cells.items()}
    with panels(*panel_rows(len(shown), 3), height=2.2) as (figure, grid):
        every = [axes for row in grid for axes in row]
        top = max(float(np.nanmax(over_mean[name])) for name in shown)
        for axes, name in zip(every, shown, strict=False):
            mesh = heat_map(axes, over_mean[name], 0, top)
            rows, experts = over_mean[name].shape
            ticks = spread_over(range(rows), 8)
            axes.set_yticks(
                [at + 0.5 for at in ticks], [layer_name(cells[name].layers[at]).removeprefix("layer ") for at in ticks]
            )
            axes.set_xticks(
                [at + 0.5 for at in spread_over(range(experts), 8)], map(str, spread_over(range(experts), 8))
            )
            name_panel(axes, name)
            axes.set_xlabel("rank of the expert")
        for axes in every[len(shown) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel("layer")
        figure.colorbar(mesh, ax=every, label="load over mean")
        svg = svg_of(figure)
    rows_of: list[list[Value]] = []
    for name, one in cells.items():
        for layer, load_E, values_E in zip(one.layers, one.counts["ranked_load"], over_mean[name], strict=True):
            for rank, load in enumerate(load_E):
                rows_of.append([name, layer_name(layer), rank, float(load), round(float(values_E[rank]), 6)])
    return Figure(
        name="loads",
        title="Load of the experts",
        caption=f"Assignments before dropping over the mean of their layer, in {late_in_words(cells.values())}. The "
        "experts of each seed are ordered from the fullest, rank 0, to the emptiest, then seeds are added up: each has "
        "other popular experts." + left_out(len(shown), len(cells), "points"),
        svg=svg,
        columns=["point", "layer", "rank", "load", "load_over_mean"],
        rows=rows_of,
    )


def over_means(one: Reduced) -> Floats:
    """[L, E] from the fullest expert down, with NaN where a layer has fewer experts."""
    loads_L = one.counts["ranked_load"]
    found = np.full((len(loads_L), max(len(load_E) for load_E in loads_L)), np.nan)
    for row, load_E in enumerate(loads_L):
        found[row, : len(load_E)] = load_E / max(load_E.mean(), 1e-30)
    return found
