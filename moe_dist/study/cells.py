"""One combination of a study's axes, with the ledger's lines of its seeds."""

from dataclasses import dataclass
from typing import Any

from moe_dist.study.grid import Scalar, Study


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the axes: the ledger's lines of its seeds that have finished, in the order of the seeds."""

    axes: dict[str, Scalar]
    records: list[dict[str, Any]]

    def values(self, name: str) -> list[float]:
        return [record[name] for record in self.records if record.get(name) is not None]

    def by_seed(self, name: str, scale: float = 1.0) -> dict[int, float]:
        """The same under their seeds, of which some may not have finished."""
        return {each["seed"]: scale * each[name] for each in self.records if each.get(name) is not None}


def cells(study: Study, latest: dict[str, dict[str, Any]]) -> list[Cell]:
    """The grid in order, without the seeds."""
    found: dict[tuple[Scalar, ...], Cell] = {}
    for point in study.points:
        cell = found.setdefault(tuple(point.axes.values()), Cell(point.axes, []))
        record = latest.get(point.name)
        if record is not None and record["status"] == "finished":
            cell.records.append(record)
    return list(found.values())
