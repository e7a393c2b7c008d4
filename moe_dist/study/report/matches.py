"""Which points of a grid are compared with which: what the question names, and all else."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.study.design.family import is_asked, with_baselines
from moe_dist.study.design.grid import CAPACITY, Scalar, Study
from moe_dist.study.design.study_file import Question
from moe_dist.study.ledger.cells import Cell, called, label, names_of
from moe_dist.study.statistics.paired import Comparison, compare_pairs, pair


@dataclass(frozen=True, slots=True)
class Match:
    """A cell and its baseline, which shares all else. setting: what they share, in words; empty where the axes are
    those of the baseline alone. short: what tells them apart. name: of the cell among all."""

    cell: Cell
    baseline: Cell
    name: str
    short: str
    baseline_short: str
    setting: str

    @property
    def within(self) -> str:
        """'1.0 (num_experts 4)'"""
        return self.short + (f" ({self.setting})" if self.setting else "")


@dataclass(frozen=True, slots=True)
class Families:
    """named: the comparisons of the question, one family. others: those with the same baseline that it leaves out, or
    without a question all with dropless. lonely: cells that the question compares, but no baseline in the grid shares
    all else with; lonely_others: those that it leaves out."""

    named: tuple[Match, ...]
    others: tuple[Match, ...]
    lonely: tuple[str, ...]
    lonely_others: tuple[str, ...]


def families(study: Study, grid: Sequence[Cell], question: Question | None) -> Families:
    baseline = baseline_of(study, question)
    if baseline is None:
        return Families((), (), (), ())
    names = names_of(grid)
    named: list[Match] = []
    others: list[Match] = []
    lonely: list[str] = []
    lonely_others: list[str] = []
    for place, other in with_baselines(baseline, [cell.axes for cell in grid]):
        cell = grid[place]
        asked = question is not None and is_asked(question, cell.axes)
        name = called(cell.axes, names)
        if other is None:
            (lonely if asked else lonely_others).append(name)
            continue
        match = Match(
            cell,
            grid[other],
            name,
            short_name(cell.axes, names, baseline),
            short_name(grid[other].axes, names, baseline),
            called({key: value for key, value in cell.axes.items() if key not in baseline}, names),
        )
        (named if asked else others).append(match)
    return Families(tuple(named), tuple(others), tuple(lonely), tuple(lonely_others))


def baseline_of(study: Study, question: Question | None) -> dict[str, Scalar] | None:
    """The question's; without one dropless, where the grid has it beside capacity factors."""
    if question is not None:
        return question.baseline
    factors = {point.axes.get(CAPACITY, 0) for point in study.points}
    return {CAPACITY: None} if None in factors and len(factors) > 1 else None


def compared(matches: Sequence[Match], metric: str, *, matters: float | None = None) -> list[Comparison]:
    """One family, whatever settings it spans."""
    pairs = {
        match.name: pair(match.cell.by_seed(metric), match.baseline.by_seed(metric), match.name) for match in matches
    }
    return compare_pairs(pairs, matters=matters)


def settings_of(matches: Sequence[Match]) -> dict[str, dict[str, Cell]]:
    """setting -> short name -> cell, the baseline last."""
    found: dict[str, dict[str, Cell]] = {}
    for match in matches:
        found.setdefault(match.setting, {})[match.short] = match.cell
    for match in matches:
        found[match.setting].setdefault(match.baseline_short, match.baseline)
    return found


def short_name(axes: dict[str, Scalar], names: dict[str, str], baseline: dict[str, Scalar]) -> str:
    """The values of the baseline's keys: alone where it has one, '1.0'."""
    values = {key: axes[key] for key in axes if key in baseline}
    if len(values) > 1:
        return called(values, names)
    ((key, value),) = values.items()
    return label(key, value)
