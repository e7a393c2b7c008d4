"""Loss against compute, where a study's grid has a ladder: at least four sizes of compute along one axis.

The law of a ladder is fitted to the baseline's points, one law for each setting of the other axes, and its largest size
is held out, predicted and scored (statistics/exchange.py). With the law each point's effective compute and effective
speed against the baseline of its own size (speed.py), and how they change over the ends of the intervals of L0 and a.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe_dist.study.design.grid import Scalar, Study, show
from moe_dist.study.ledger.cells import Cell, called, names_of
from moe_dist.study.report.matches import short_name
from moe_dist.study.statistics.exchange import HeldOut, LawFit, Rung, fit_law, hold_out
from moe_dist.study.statistics.speed import EffectiveSpeed, Measured, effective_speeds, sensitivity

_SIZES = 4
_SPAN = 2.0
_APART = 1.05
_LADDERS = 6


@dataclass(frozen=True, slots=True)
class Speed:
    """One point at one size. range: of the effective speed over the ends of the law's intervals, None without them."""

    setting: str
    size: str
    effective: EffectiveSpeed
    range: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Ladder:
    """setting: the other axes in words. sizes: labels of the rungs, from the smallest."""

    setting: str
    sizes: tuple[str, ...]
    rungs: tuple[Rung, ...]
    fit: LawFit
    held_out: HeldOut


@dataclass(frozen=True, slots=True)
class Ladders:
    """axis: along which compute grows. left_out: why there is none, or what is missing."""

    axis: str
    ladders: tuple[Ladder, ...]
    speeds: tuple[Speed, ...]
    left_out: str = ""


def ladders(study: Study, grid: Sequence[Cell], baseline: Mapping[str, Scalar] | None, metric: str) -> Ladders:
    """metric: a loss in nats."""
    of_baseline = [cell for cell in grid if cell.axes | dict(baseline or {}) == cell.axes and cell.values(metric)]
    axis = next((key for key in _axes(study) if _is_ladder(key, of_baseline)), None)
    if axis is None:
        few = f"no axis of the grid has {_SIZES} sizes of compute over a factor of {_SPAN:g} with all else the same"
        return Ladders("", (), (), f"Loss against compute is left out: {few}.")
    names = names_of(grid)
    found: list[Ladder] = []
    speeds: list[Speed] = []
    settings = _settings(of_baseline, axis)
    for members in list(settings.values())[:_LADDERS]:
        rest = {key: value for key, value in members[0].axes.items() if key != axis}
        setting = called({key: value for key, value in rest.items() if key not in (baseline or {})}, names)
        members = sorted(members, key=lambda cell: cell.mean("flops") or 0.0)
        rungs = [Rung(cell.mean("flops") or 0.0, cell.by_seed(metric)) for cell in members]
        ladder = Ladder(
            setting,
            tuple(show(cell.axes[axis]) for cell in members),
            tuple(rungs),
            fit_law(rungs, draws=200),
            hold_out(rungs, draws=200),
        )
        found.append(ladder)
        if baseline is not None:
            speeds += _speeds(ladder, members, grid, dict(baseline), axis, metric, names)
    more = len(settings) - len(found)
    said = f"{more} more ladders of other settings are not fitted." if more > 0 else ""
    return Ladders(names[axis], tuple(found), tuple(speeds), said)


def _axes(study: Study) -> list[str]:
    """Those that move several keys first: they are made for it."""
    return sorted(study.points[0].axes, key=lambda key: key not in study.file.vary_together)


def _is_ladder(axis: str, cells: Sequence[Cell]) -> bool:
    if any(cell.mean("flops") is None for cell in cells):
        return False
    settings = _settings(cells, axis).values()
    return bool(settings) and all(_climbs([cell.mean("flops") or 0.0 for cell in members]) for members in settings)


def _climbs(compute: Sequence[float]) -> bool:
    steps = sorted(compute)
    apart = all(high > low * _APART for low, high in pairwise(steps))
    return len(steps) >= _SIZES and apart and steps[-1] >= _SPAN * steps[0]


def _settings(cells: Sequence[Cell], axis: str) -> dict[tuple[Scalar, ...], list[Cell]]:
    found: dict[tuple[Scalar, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(tuple(value for key, value in cell.axes.items() if key != axis), []).append(cell)
    return found


def _speeds(
    ladder: Ladder,
    members: Sequence[Cell],
    grid: Sequence[Cell],
    baseline: dict[str, Scalar],
    axis: str,
    metric: str,
    names: dict[str, str],
) -> list[Speed]:
    law, found = ladder.fit.law, []
    for base in members:
        points = {
            short_name(cell.axes, names, baseline): _measured(cell, metric)
            for cell in grid
            if cell is not base and cell.axes | baseline == base.axes and cell.values(metric)
        }
        before = _measured(base, metric)
        points = {
            name: point
            for name, point in points.items()
            if point.losses.keys() & point.throughputs.keys() & before.losses.keys() & before.throughputs.keys()
        }
        least = min(value for each in (before, *points.values()) for value in each.losses.values())
        if least <= law.floor or not points:
            continue
        ends = _ends(ladder.fit, least)
        varied = sensitivity(points, before, floors=ends[0], exponents=ends[1]) if ends else []
        for each in effective_speeds(points, before, floor=law.floor, exponent=law.exponent):
            over = [other.speed for other in varied if other.name == each.name]
            found.append(Speed(ladder.setting, show(base.axes[axis]), each, (min(over), max(over)) if over else None))
    return found


def _ends(fit: LawFit, least: float) -> tuple[list[float], list[float]] | None:
    """Ends of the intervals of L0 and a; an L0 that a loss has reached is cut to just below it."""
    if fit.floor is None or fit.exponent is None:
        return None
    floors = [min(floor, 0.999 * least) for floor in (fit.floor.low, fit.floor.high)]
    return floors, [fit.exponent.low, fit.exponent.high]


def _measured(cell: Cell, metric: str) -> Measured:
    return Measured(cell.by_seed(metric), cell.by_seed("tokens_per_second"))
