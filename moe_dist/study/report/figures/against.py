"""Losses, evaluations and drops against one axis: dots of seeds, means with t intervals, dropless to the right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes

from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import plain, svg_of
from moe_dist.study.report.figures.canvas import LINES, from_zero, left_out, legend, look, panel_rows, panels
from moe_dist.study.statistics.samples import BySeed, t_interval

_COLUMNS = 3
_APART = 0.015
_TICKS = 6
_GROUPS, _METRICS = 4, 3
"""Rows and columns of several groups: the first so many are drawn."""


@dataclass(frozen=True, slots=True)
class Stop:
    """One place on the x axis. beyond: dropless, which is reached by a dotted line. values: metric -> by seed."""

    label: str
    x: float
    beyond: bool
    values: Mapping[str, BySeed]


@dataclass(frozen=True, slots=True)
class Line:
    """group: its panel. name: in the legend, empty where there is one line alone. joined: between stops there is
    something, as between numbers, and not between names."""

    group: str
    name: str
    stops: Sequence[Stop]
    joined: bool = True


def against(lines: Sequence[Line], x_name: str, metrics: Mapping[str, tuple[str, float]]) -> Figure:
    """metrics: name -> (title, scale), the most important first. Of several groups each has its own row of panels."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    shown = dict(list(groups.items())[:_GROUPS])
    columns = _COLUMNS if len(shown) == 1 else _METRICS
    drawn_metrics = list(metrics.items())[: None if len(shown) == 1 else _METRICS]
    wanted = [(group, metric) for group in shown for metric in drawn_metrics]
    with panels(*panel_rows(len(wanted), columns)) as (figure, grid):
        every = [axes for row in grid for axes in row]
        for axes, (group, (metric, (title, scale))) in zip(every, wanted, strict=False):
            lines_of = shown[group][:LINES]
            apart = _APART * _span(lines_of)
            for number, line in enumerate(lines_of):
                _draw(axes, line, metric, scale, number, apart * (number - (len(lines_of) - 1) / 2))
            _label(axes, shown[group], x_name, f"{title}\n{group}" if group else title)
            if "drop" in metric:
                from_zero(axes)
        for axes in every[len(wanted) :]:
            axes.set_visible(False)
        legend(figure, every[0])
        svg = svg_of(figure)
    drawn = sum(min(LINES, len(members)) for members in shown.values())
    return Figure(
        name="against",
        title=f"Losses, evaluations and drops against {x_name}",
        caption="A dot a seed; lines join means, where there is something between them; bars are 95% t intervals of "
        "the mean over seeds (three at least), which hold what all points of a seed share; those of minus baseline, "
        "which is taken seed by seed, do not."
        + left_out(drawn, len(lines), "lines")
        + left_out(len(drawn_metrics), len(metrics), "numbers"),
        svg=svg,
        columns=["group", "line", x_name, "metric", "seed", "value", "mean", "low", "high"],
        rows=_rows(lines, metrics),
    )


def _draw(axes: Axes, line: Line, metric: str, scale: float, number: int, shift: float) -> None:
    """shift: of bars and dots, so that those of several lines stand side by side."""
    color, marker = look(number)
    stops = sorted((stop for stop in line.stops if stop.values.get(metric)), key=lambda stop: stop.x)
    means = [scale * fmean(stop.values[metric].values()) for stop in stops]
    inside = [at for at, stop in enumerate(stops) if line.joined and not stop.beyond]
    axes.plot([stops[at].x for at in inside], [means[at] for at in inside], color=color, label=plain(line.name))
    if inside and len(inside) < len(stops):
        ends = [inside[-1], len(stops) - 1]
        axes.plot([stops[at].x for at in ends], [means[at] for at in ends], color=color, linestyle=(0, (2, 2)))
    bars = [(stop.x + shift, t_interval(list(stop.values[metric].values()))) for stop in stops]
    known = [(x, scale * bar.low, scale * bar.high) for x, bar in bars if bar is not None]
    axes.vlines([x for x, _, _ in known], [low for _, low, _ in known], [high for _, _, high in known], color=color)
    axes.plot([stop.x + shift for stop in stops], means, "_", color=color, markersize=12, markeredgewidth=1.6)
    dots = [(stop.x + shift, scale * value) for stop in stops for value in stop.values[metric].values()]
    axes.plot([x for x, _ in dots], [y for _, y in dots], marker, color=color, markersize=3.6, alpha=0.75)


def _span(lines: Sequence[Line]) -> float:
    places = [stop.x for line in lines for stop in line.stops]
    return max(places) - min(places)


def _label(axes: Axes, lines: Sequence[Line], x_name: str, title: str) -> None:
    ticks = {stop.x: plain(stop.label) for line in lines for stop in line.stops}
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=7 if len(ticks) > _TICKS else None)
    axes.set_xlabel(x_name)
    axes.set_title(plain(title))
    axes.margins(x=0.08)


def _rows(lines: Sequence[Line], metrics: Mapping[str, tuple[str, float]]) -> list[list[Value]]:
    rows: list[list[Value]] = []
    for line in lines:
        for stop in line.stops:
            for metric in metrics:
                values = stop.values.get(metric) or {}
                interval = t_interval(list(values.values()))
                low, high = (None, None) if interval is None else (interval.low, interval.high)
                for seed, value in values.items():
                    mean = fmean(values.values())
                    rows.append([line.group, line.name, stop.label, metric, seed, value, mean, low, high])
    return rows
