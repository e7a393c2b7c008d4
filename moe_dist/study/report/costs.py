"""What a point costs: time (steps times the median step), FLOPs, bytes or memory, each by the ledger's line.

FLOPs are executed ones: nominal ones are the same at every capacity factor.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from moe_dist.study.ledger.cells import Cell

COSTS = {
    "time": "time of all steps (s)",
    "flops": "FLOPs, executed",
    "bytes": "bytes sent between ranks",
    "memory": "memory (MiB)",
}

SAME_COST = {"time": 0.02, "flops": 0.0, "bytes": 0.0, "memory": 0.0}
"""Relative difference that does not count: times are measured, the rest is counted."""


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
