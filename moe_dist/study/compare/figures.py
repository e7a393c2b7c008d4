"""The figures of a comparison. Each run has one colour and one marker throughout.

A curve of more than POINTS steps is drawn as means over POINTS bins of as many steps each; its CSV has what is drawn.
Axes leave room for a curve's course, not for its first tenth: where that lies above the rest, it is cut off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from moe_dist.study.compare.runs import Curve, RunRecord
from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import SERIES, heat_map, plain, style, svg_of

POINTS = 100
_LAYERS = 16
_LINES = ["-", (0, (5, 1.5))]
_COLUMNS = ("run", "measure", "steps of the run", "value", "steps in the mean")


@dataclass(frozen=True, slots=True)
class Panel:
    """measure: a name of metrics.jsonl. scale: what its values are multiplied by. few: drawn with a marker at each."""

    measure: str
    title: str
    scale: float = 1.0
    few: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Means over bins. last: the last step of each; count: steps in it."""

    last: np.ndarray
    values: np.ndarray
    count: np.ndarray


def thinned(curve: Curve, points: int = POINTS) -> Kept:
    """The curve in at most `points` bins of as many steps each, to within one."""
    edges = np.linspace(0, len(curve.steps), min(points, len(curve.steps)) + 1).round().astype(int)
    count = np.diff(edges)
    means = np.add.reduceat(curve.values, edges[:-1]) / count
    return Kept(curve.steps[edges[1:] - 1], means, count)


def curves(name: str, title: str, caption: str, runs: Sequence[RunRecord], panels: Sequence[Panel]) -> Figure | None:
    """One panel beside another; None where no run has any of their measures."""
    panels = [panel for panel in panels if any(panel.measure in run.curves for run in runs)]
    if not panels:
        return None
    scale, x_label = _x_axis(runs)
    rows: list[list[Value]] = []
    with style():
        figure = Drawing(figsize=(5.1 * len(panels) if len(panels) > 1 else 6.8, 3.5))
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels), sharex=True)), panels, strict=True):
            tops = []
            for number, run in enumerate(runs):
                if panel.measure in run.curves:
                    kept = thinned(run.curves[panel.measure])
                    heights = kept.values * panel.scale
                    _line(axes, kept.last * scale(run), heights, number, run.label, panel.few)
                    tops.append(heights[len(heights) // 10 :].max())
                    rows += [
                        [run.label, panel.measure, int(step), float(value), int(count)]
                        for step, value, count in zip(kept.last, kept.values, kept.count, strict=True)
                    ]
            _frame(axes, panel, x_label, max(tops))
        _legend(figure, [run.label for run in runs], [any(p.measure in run.curves for p in panels) for run in runs])
        svg = svg_of(figure)
    return Figure(name=name, title=title, caption=caption, svg=svg, columns=_COLUMNS, rows=rows)


def load_map(runs: Sequence[RunRecord]) -> Figure | None:
    """A panel for each run with experts: a row a layer, a column an expert, its load over the layer's mean."""
    runs = [run for run in runs if run.load]
    if not runs:
        return None
    shares = [{site: load / max(load.mean(), 1e-9) for site, load in run.load.items()} for run in runs]
    most = max(float(share.max()) for layers in shares for share in layers.values())
    across = 1 if len(runs) == 1 else 2
    deep = -(-len(runs) // across)
    shown = [list(layers)[:: -(-len(layers) // _LAYERS)] for layers in shares]
    height = max(len(sites) for sites in shown)
    with style():
        figure = Drawing(figsize=(5.1 * across if across > 1 else 6.8, deep * (1.1 + 0.26 * max(height, 3))))
        grid = list(np.atleast_1d(figure.subplots(deep, across)).flat)
        for axes, run, layers, sites in zip(grid, runs, shares, shown, strict=False):
            values = np.full((len(sites), max(len(layers[site]) for site in sites)), np.nan)
            for row, site in enumerate(sites):
                values[row, : len(layers[site])] = layers[site]
            mesh = heat_map(axes, values, 0.0, max(most, 2.0))
            every = -(-values.shape[1] // 16)
            axes.set_xticks(np.arange(0, values.shape[1], every) + 0.5, range(0, values.shape[1], every))
            axes.set_yticks(np.arange(len(sites)) + 0.5, [_site(site) for site in sites])
            axes.set_title(plain(run.label))
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
        for axes in grid[len(runs) :]:
            axes.set_visible(False)
        figure.colorbar(mesh, ax=grid, label="load over the layer's mean", pad=0.02, aspect=12 * deep)
        svg = svg_of(figure)
    rows: list[list[Value]] = [
        [run.label, layer, kind, expert, int(load), float(share)]
        for run, layers in zip(runs, shares, strict=True)
        for (layer, kind), share_E in layers.items()
        for expert, (load, share) in enumerate(zip(run.load[layer, kind], share_E, strict=True))
    ]
    fewer = f" Of more than {_LAYERS} layers some are drawn, at equal distances; the data has all." * any(
        len(sites) < len(layers) for sites, layers in zip(shown, shares, strict=True)
    )
    caption = (
        "Assignments that the router made, before any was dropped, over the last quarter of the steps; 1 is an even "
        f"share.{fewer}"
    )
    columns = ("run", "layer", "kind", "expert", "assignments", "over the mean")
    return Figure(name="load-map", title="Load of each expert", caption=caption, svg=svg, columns=columns, rows=rows)


def _x_axis(runs: Sequence[RunRecord]) -> tuple[Callable[[RunRecord], float], str]:
    """Steps; tokens where a step has more of them in one run than in another."""
    if len({run.step_tokens for run in runs}) == 1:
        return lambda run: 1.0, "step"
    return lambda run: run.step_tokens / 1e6, "tokens (millions)"


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, number: int, label: str, few: bool) -> None:
    """Markers stand at some points alone, at other ones in each run, so that runs on top of each other stay apart."""
    color, marker = SERIES[number % len(SERIES)]
    apart = max(1, len(x) // 8)
    axes.plot(
        x,
        y,
        color=color,
        marker=marker,
        markevery=1 if few and len(x) <= 25 else (number * apart // len(SERIES) % apart, apart),
        linestyle=_LINES[number // len(SERIES) % len(_LINES)],
        linewidth=1.4,
        label=plain(label),
    )


def _frame(axes: Axes, panel: Panel, x_label: str, top: float) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(x_label)
    low, high = axes.get_ylim()
    if panel.from_zero:
        low = -0.02 * top  # a line at zero is seen
    reach = top + 0.06 * max(top - low, 1e-9)
    axes.set_ylim(low, reach if reach < high else high)


def _legend(figure: Drawing, names: Sequence[str], drawn: Sequence[bool]) -> None:
    """Above the panels, in as many columns as the names leave room for."""
    handles, said = [], set()
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in said:
                handles.append(handle)
                said.add(label)
    longest = max(len(name) for name, used in zip(names, drawn, strict=True) if used)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12) // (longest + 6)))
    order = {plain(name): place for place, name in enumerate(names)}
    handles.sort(key=lambda handle: order[str(handle.get_label())])
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _site(site: tuple[int, str]) -> str:
    layer, kind = site
    return f"{layer} {kind}" if kind == "attention" else str(layer)
