"""Loss against what it costs, with the front: points that nothing as cheap is told to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import FAINT, plain, svg_of
from moe_dist.study.report.costs import counted_as_equal
from moe_dist.study.report.figures.canvas import legend, look, panel_rows, panels
from moe_dist.study.statistics.pareto import Candidate, Place, Standing, pareto
from moe_dist.study.statistics.samples import BySeed, Interval, t_interval

_LABELLED = 6
_LOOKS = {Standing.FRONT: 2, Standing.INSIDE_NOISE: 0, Standing.DOMINATED: 6}


@dataclass(frozen=True, slots=True)
class Priced:
    """values: of the metric, by seed. costs: kind -> number."""

    values: BySeed
    costs: Mapping[str, float]


def fronts(points: Mapping[str, Priced], same_costs: Mapping[str, float], sign: float) -> dict[str, list[Place]]:
    """Of each cost. same_costs: relative differences that do not count. sign: -1 where more of the metric is better."""
    return {
        cost: pareto(
            {
                name: Candidate(point.costs[cost], {seed: sign * value for seed, value in point.values.items()})
                for name, point in points.items()
            },
            same_cost=same,
        )
        for cost, same in same_costs.items()
    }


def pareto_figure(
    points: Mapping[str, Priced], titles: Mapping[str, str], same_costs: Mapping[str, float], metric: str, sign: float
) -> Figure:
    """titles: cost -> the name of its axis. same_costs: of `fronts`."""
    found = fronts(points, same_costs, sign)
    with panels(*panel_rows(len(titles), 2)) as (figure, grid):
        every = [axes for row in grid for axes in row]
        for axes, (cost, title) in zip(every, titles.items(), strict=False):
            _draw(axes, points, found[cost], sign)
            axes.set_xlabel(title)
            axes.set_ylabel(metric)
        for axes in every[len(titles) :]:
            axes.set_visible(False)
        legend(figure, every[0])
        svg = svg_of(figure)
    rows: list[list[Value]] = []
    for cost, places in found.items():
        for place in places:
            interval = t_interval(list(points[place.name].values.values()))
            low, high = (None, None) if interval is None else (interval.low, interval.high)
            standing = [str(place.standing), ", ".join(place.against)]
            rows.append([place.name, cost, place.cost, sign * place.loss, low, high, *standing])
    return Figure(
        name="pareto",
        title=f"{metric[:1].upper()}{metric[1:]} against what it costs",
        caption="Front: its metric is told to be better than that of all points that cost no more, by paired tests of "
        "all pairs (Holm). Inside noise: one of those is not told apart. Dominated: one is told to be better. Bars are "
        f"95% t intervals of the mean.{counted_as_equal(same_costs)}",
        svg=svg,
        columns=["point", "cost", "value", "mean", "low", "high", "standing", "against"],
        rows=rows,
    )


def _draw(axes: Axes, points: Mapping[str, Priced], places: Sequence[Place], sign: float) -> None:
    for standing, number in _LOOKS.items():
        of_it = [place for place in places if place.standing is standing]
        color, marker = look(number)
        axes.plot(
            [place.cost for place in of_it],
            [sign * place.loss for place in of_it],
            marker,
            color=color,
            label=str(standing),
        )
        for place in of_it:
            interval: Interval | None = t_interval(list(points[place.name].values.values()))
            if interval is not None:
                axes.vlines(place.cost, interval.low, interval.high, color=color, linewidth=1.0)
    front = sorted((place for place in places if place.standing is Standing.FRONT), key=lambda place: place.cost)
    axes.plot([place.cost for place in front], [sign * place.loss for place in front], color=look(2)[0], linewidth=1.0)
    named = [place for place in places if place.standing is not Standing.DOMINATED]
    for place in named if len(named) <= _LABELLED else ():
        at = (place.cost, sign * place.loss)
        text = axes.annotate(plain(place.name), at, xytext=(4, 4), textcoords="offset points", fontsize=7, color=FAINT)
        text.set_in_layout(False)
    axes.margins(x=0.25)
    costs = [place.cost for place in places]
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
