"""Loss against compute, where a study's grid has a ladder: at least four sizes of compute along one axis.

The law of a ladder is fitted to the baseline's points, one law for each setting of the other axes, and its largest size
is held out, predicted and scored (statistics/exchange.py). With the law each point's effective compute and effective
speed against the baseline of its own size (speed.py), and how they change over the ends of the intervals of L0 and a.
A law that the study's file gives takes the place of the fitted ones there; its L0 and a are varied by a tenth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe_dist.study.design.grid import Scalar, Study, show
from moe_dist.study.design.study_file import GivenLaw
from moe_dist.study.ledger.cells import Cell, called, names_of
from moe_dist.study.report.matches import short_name
from moe_dist.study.statistics.exchange import HeldOut, LawFit, Rung, fit_law, hold_out
from moe_dist.study.statistics.speed import EffectiveSpeed, Measured, effective_speeds, sensitivity

_SIZES = 4
_SPAN = 2.0
_APART = 1.05
_LADDERS = 6
_GIVEN = 0.1  # how uncertain L0 and a of a given law are taken to be


@dataclass(frozen=True, slots=True)
class Rate:
    """At which loss is exchanged for compute. floors, exponents: the ends of their intervals; None without these."""

    floor: float
    exponent: float
    floors: tuple[float, float] | None
    exponents: tuple[float, float] | None

    @staticmethod
    def of(fit: LawFit) -> "Rate":
        floors, exponents = ((None if at is None else (at.low, at.high)) for at in (fit.floor, fit.exponent))
        return Rate(fit.law.floor, fit.law.exponent, floors, exponents)

    @staticmethod
    def given(law: GivenLaw) -> "Rate":
        floors, exponents = ((at * (1 - _GIVEN), at * (1 + _GIVEN)) for at in (law.floor, law.exponent))
        return Rate(law.floor, law.exponent, floors, exponents)


@dataclass(frozen=True, slots=True)
class Speed:
    """One point at one size, which is empty without a ladder. range: of the effective speed over the ends of the rate's
    intervals, None without them."""

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
    """axis: along which compute grows; empty without a ladder. speeds: by the law of each ladder, or the given one.
    left_out: why there is no ladder, or what is missing."""

    axis: str
    ladders: tuple[Ladder, ...]
    speeds: tuple[Speed, ...]
    left_out: str = ""


def ladders(study: Study, grid: Sequence[Cell], baseline: Mapping[str, Scalar] | None, metric: str) -> Ladders:
    """metric: a loss in nats."""
    of_baseline = [cell for cell in grid if cell.axes | dict(baseline or {}) == cell.axes and cell.values(metric)]
    names, given = names_of(grid), None if study.file.law is None else Rate.given(study.file.law)
    found: list[Ladder] = []
    speeds: list[Speed] = []
    missing: list[str] = []
    if given is not None and baseline is not None:
        for base in of_baseline:
            setting = called({key: value for key, value in base.axes.items() if key not in baseline}, names)
            of_base, why = _speeds(given, base, grid, baseline, metric, names, setting, "")
            speeds += of_base
            missing += why
    axis = next((key for key in _axes(study) if _is_ladder(key, of_baseline)), None)
    if axis is None:
        few = f"no axis of the grid has {_SIZES} sizes of compute over a factor of {_SPAN:g} with all else the same"
        missing.insert(0, f"A law of loss against compute is not fitted: {few}.")
        return Ladders("", (), tuple(speeds), " ".join(missing))
    settings = _settings(of_baseline, axis)
    for members in list(settings.values())[:_LADDERS]:
        rest = {key: value for key, value in members[0].axes.items() if key != axis}
        setting = called({key: value for key, value in rest.items() if key not in (baseline or {})}, names)
        members = sorted(members, key=lambda cell: cell.mean("flops") or 0.0)
        rungs = [Rung(cell.mean("flops") or 0.0, cell.by_seed(metric)) for cell in members]
        sizes = tuple(show(cell.axes[axis]) for cell in members)
        try:
            ladder = Ladder(setting, sizes, tuple(rungs), fit_law(rungs, draws=200), hold_out(rungs, draws=200))
        except ValueError as error:
            missing.append(f"A law is left out{f' at {setting}' if setting else ''}: {error}.")
            continue
        found.append(ladder)
        for base in members if baseline is not None and given is None else ():
            size = show(base.axes[axis])
            of_base, why = _speeds(Rate.of(ladder.fit), base, grid, baseline or {}, metric, names, setting, size)
            speeds += of_base
            missing += why
    more = len(settings) - _LADDERS
    if more > 0:
        missing.insert(0, f"{more} more ladders of other settings are not fitted.")
    return Ladders(names[axis], tuple(found), tuple(speeds), " ".join(missing))


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
    rate: Rate,
    base: Cell,
    grid: Sequence[Cell],
    baseline: Mapping[str, Scalar],
    metric: str,
    names: dict[str, str],
    setting: str,
    size: str,
) -> tuple[list[Speed], list[str]]:
    """Of all points that share all else with `base`; and why there are none, where a loss has reached L0."""
    before = _measured(base, metric)
    points = {
        short_name(cell.axes, names, dict(baseline)): _measured(cell, metric)
        for cell in grid
        if cell is not base and cell.axes | dict(baseline) == base.axes and cell.values(metric)
    }
    points = {
        name: point
        for name, point in points.items()
        if point.losses.keys() & point.throughputs.keys() & before.losses.keys() & before.throughputs.keys()
    }
    least = min(value for each in (before, *points.values()) for value in each.losses.values())
    if not points:
        return [], []
    if least <= rate.floor:
        where = f"at {', '.join(filter(None, (setting, size)))} " if setting or size else ""
        reached = f"a loss of {least:.4g} is not above L0 = {rate.floor:.4g}, so no compute reaches it"
        return [], [f"Effective compute and speed {where}are left out: {reached}."]
    varied: list[EffectiveSpeed] = []
    if rate.floors is not None and rate.exponents is not None:  # an L0 that a loss has reached is cut to just below it
        floors = [min(floor, 0.999 * least) for floor in rate.floors]
        varied = sensitivity(points, before, floors=floors, exponents=rate.exponents)
    found = []
    for each in effective_speeds(points, before, floor=rate.floor, exponent=rate.exponent):
        over = [other.speed for other in varied if other.name == each.name]
        found.append(Speed(setting, size, each, (min(over), max(over)) if over else None))
    return found, []


def _measured(cell: Cell, metric: str) -> Measured:
    return Measured(cell.by_seed(metric), cell.by_seed("tokens_per_second"))
