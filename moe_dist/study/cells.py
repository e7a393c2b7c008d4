"""One combination of a study's axes, with the ledger's lines of its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moe_dist.study.grid import CAPACITY, Point, Scalar, Study, show


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
    """The grid in order, without the seeds."""
    points: dict[tuple[Scalar, ...], list[Point]] = {}
    for point in study.points:
        points.setdefault(tuple(point.axes.values()), []).append(point)
    return [
        Cell(
            of_one[0].axes,
            [latest[each.name] for each in of_one if latest.get(each.name, {}).get("status") == "finished"],
            tuple(of_one),
        )
        for of_one in points.values()
    ]


def label(key: str, value: Scalar) -> str:
    """A value of an axis: null is dropless of the capacity factor."""
    return "dropless" if key == CAPACITY and value is None else show(value)


def called(axes: Mapping[str, Scalar], names: Mapping[str, str], keys: Sequence[str] | None = None) -> str:
    """A cell in words, or what some keys say of it: 'num_experts 4, dropless'. names: of `axis_names`."""
    chosen = axes if keys is None else {key: axes[key] for key in axes if key in keys}
    return ", ".join(
        label(key, value) if label(key, value) == "dropless" else f"{names[key]} {show(value)}"
        for key, value in chosen.items()
    )
