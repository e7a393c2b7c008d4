"""One combination of a study's axes, with the ledger's lines of its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moe_dist.study.design.grid import CAPACITY, Point, Scalar, Study, axis_names, show

Record = Mapping[str, Any]
"""A line of the ledger (measure.py)."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the axes: the ledger's lines of its seeds that have finished, in the order of the seeds, and
    its points, finished or not."""

    axes: dict[str, Scalar]
    records: list[dict[str, Any]]
    points: tuple[Point, ...] = ()

    def values(self, name: str) -> list[float]:
        return [record[name] for record in self.records if record.get(name) is not None]

    def by_seed(self, name: str, scale: float = 1.0) -> dict[int, float]:
        """The same under their seeds, of which some may not have finished."""
        return {each["seed"]: scale * each[name] for each in self.records if each.get(name) is not None}

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return fmean(values) if values else None


def cells(study: Study, latest: Mapping[str, dict[str, Any]]) -> list[Cell]:
    """The grid in order, without the seeds. A line goes by its point's name, which has the seeds; their number is that
    of the study as it is now, as pairs are numbered anew where one comes in between."""
    points: dict[tuple[Scalar, ...], list[Point]] = {}
    for point in study.points:
        points.setdefault(tuple(point.axes.values()), []).append(point)
    return [
        Cell(
            of_one[0].axes,
            [
                latest[each.name] | {"seed": each.seed}
                for each in of_one
                if latest.get(each.name, {}).get("status") == "finished"
            ],
            tuple(of_one),
        )
        for of_one in points.values()
    ]


def label(key: str, value: Scalar) -> str:
    """A value of an axis: null is dropless of the capacity factor."""
    return "dropless" if key == CAPACITY and value is None else show(value)


def names_of(grid: Sequence[Cell]) -> dict[str, str]:
    """Axis -> its short name, of those that vary; of all where none does."""
    varied = {key for key in grid[0].axes if len({str(cell.axes[key]) for cell in grid}) > 1}
    return {key: name for key, name in axis_names(list(grid[0].axes)).items() if key in varied or not varied}


def called(axes: Mapping[str, Scalar], names: Mapping[str, str]) -> str:
    """What the axes with a name say of a cell, in words: 'num_experts 4, dropless'. names: of `names_of`, or some."""
    values = {key: label(key, value) for key, value in axes.items() if key in names}
    return ", ".join(text if text == "dropless" else f"{names[key]} {text}" for key, text in values.items())
