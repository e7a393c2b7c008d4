"""What a point costs: time (steps times the median step), FLOPs, bytes or memory, each by the ledger's line.

FLOPs are executed ones: nominal ones are the same at every capacity factor.

Times are measured, and memory is on a CPU, where it is what the process held; the rest is counted. Two times count as
equal unless they differ by more than 2%, two amounts of memory 1%, and by more than equal ones would in 95 of 100
studies: by the spread s of their logarithms over the seeds of a point, pooled over points, means of n seeds differ by
less than t(0.975) s sqrt(2 / n).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scipy import stats

from moe_dist.study.ledger.cells import Cell
from moe_dist.study.statistics.power import noise_floor

COSTS = {
    "time": "time of all steps (s)",
    "flops": "FLOPs, executed",
    "bytes": "bytes sent between ranks",
    "memory": "memory (MiB)",
}

_SAME = {"time": 0.02, "memory": 0.01}
"""What does not count however little the seeds differ, of what is measured."""
_IN_WORDS = {"time": "times", "memory": "amounts of memory"}
_MOST = 0.99


def same_cost(cells: Sequence[Cell], by: str) -> float:
    """Relative difference of two costs that does not count. cells: all of the study."""
    if by not in _SAME:
        return 0.0
    logs = {
        str(number): {each["seed"]: math.log(value) for each in cell.records if (value := _of(each, by))}
        for number, cell in enumerate(cells)
    }
    floor = noise_floor(logs)
    if floor is None:
        return _SAME[by]
    seeds = min(len(values) for values in logs.values() if len(values) > 1)
    apart = float(stats.t.ppf(0.975, floor.degrees)) * floor.deviation * math.sqrt(2 / seeds)
    return min(max(_SAME[by], math.expm1(apart)), _MOST)


def counted_as_equal(same: Mapping[str, float]) -> str:
    """For notes, with a blank before; empty where all is counted. same: cost -> of `same_cost`."""
    words = " and ".join(f"{_IN_WORDS[by]} within {share:.0%}" for by, share in same.items() if share > 0)
    return f" {words[:1].upper()}{words[1:]} count as equal." if words else ""


def cost(cell: Cell, by: str) -> float | None:
    """Mean over seeds; None where a line lacks it, or it is 0, as bytes are on one rank."""
    values = [_of(record, by) for record in cell.records]
    known = [value for value in values if value is not None and value > 0]
    return fmean(known) if known and len(known) == len(values) else None


def costs_of(cells: Sequence[Cell]) -> list[str]:
    """Those that all cells with results have."""
    return [by for by in COSTS if all(cost(cell, by) is not None for cell in cells if cell.records)]


def _of(record: dict[str, Any], by: str) -> float | None:
    match by:
        case "time":
            return _product(record.get("step_seconds"), record.get("steps"))
        case "flops":
            return record.get("flops_executed")
        case "bytes":
            return _product(record.get("dispatch_bytes"), record.get("steps"))
    memory = record.get("memory_bytes")
    return None if memory is None else memory / 2**20


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other
