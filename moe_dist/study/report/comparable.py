"""Whether what is compared differs in what the question asks about alone: the checks of pairs, budget, schedule and
same start of checks.py."""

from collections.abc import Iterator, Sequence

from moe_dist.study.design.budget import LARGEST_RESIDUAL
from moe_dist.study.design.grid import Study
from moe_dist.study.design.planned import planned_flops
from moe_dist.study.ledger.cells import Cell, Record
from moe_dist.study.report.finding import Finding
from moe_dist.study.report.matches import Families
from moe_dist.study.report.metric import title

_TIME_APART = 0.1


def pairs(study: Study, found: Families) -> Iterator[Finding]:
    metric = "validation_loss" if study.file.question is None else study.file.question.metric
    for match in (*found.named, *found.others):
        planned = {point.seed for cell in (match.cell, match.baseline) for point in cell.points}
        alone = sorted(planned - (match.cell.by_seed(metric).keys() & match.baseline.by_seed(metric).keys()))
        if alone:
            yield Finding(
                "violation",
                "pairs",
                f"seeds {', '.join(map(str, alone))} of {match.name} or its baseline lack the {title(metric)}, on one "
                "side or on both, and play no part",
                tuple(point.name for point in match.cell.points if point.seed in alone),
                "finish both sides, or name the seeds left out",
            )
    what = "the grid has no baseline that shares all else with them"
    if found.lonely:
        yield Finding("violation", "pairs", what, found.lonely, "add it to the axes, or take them out of the question")
    if found.lonely_others and study.file.question is not None:
        remedy = "nothing, where the question leaves them out on purpose"
        yield Finding("warning", "pairs", f"{what}, nor does the question ask for it", found.lonely_others, remedy)


def budget(study: Study, records: Sequence[Record], found: Families) -> Iterator[Finding]:
    equal = study.file.equal
    if equal is not None:
        known = _spent(study, records, equal)
        apart = _TIME_APART if equal == "time" else 2 * LARGEST_RESIDUAL
        if known and max(known.values()) > min(known.values()) * (1 + apart):
            low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            what = f"`equal: {equal}` is not kept: {known[low]:.4g} to {known[high]:.4g}"
            yield Finding("violation", "budget", what, (low, high), "give train.steps back to the study, and run anew")
        return
    for match in (*found.named, *found.others):
        mine, others = match.cell.mean("tokens"), match.baseline.mean("tokens")
        if mine is not None and others is not None and mine != others:
            what = f"{match.name} was trained on {mine:.6g} tokens and its baseline on {others:.6g}"
            remedy = "state `equal: tokens` (or flops, time), or read the difference as one of budget too"
            yield Finding("violation", "budget", what, _names(match.cell), remedy)


def _spent(study: Study, records: Sequence[Record], equal: str) -> dict[str, float]:
    """By point. FLOPs are counted as the budget does, without rows that a factor below 1 has no place for."""
    configs = {point.name: point.config for point in study.points}
    if equal == "flops":
        return {
            record["point"]: planned_flops(config, study.file.ranks) * record["steps"] / config.train.steps
            for record in records
            if (config := configs.get(record["point"])) is not None
        }
    field = {"tokens": "tokens", "time": "seconds"}[equal]
    return {record["point"]: record[field] for record in records if record.get(field)}


def schedule(study: Study, records: Sequence[Record], found: Families) -> Iterator[Finding]:
    planned = {point.name: point.config for point in study.points}
    short = tuple(
        record["point"]
        for record in records
        if record["point"] in planned and record["steps"] != planned[record["point"]].train.steps
    )
    if short:
        what = "ended at another step than the schedule does, so the learning rate's decay is not at its end"
        yield Finding("violation", "schedule", what, short, "remove these points' folders and lines, and run them anew")
    for match in (*found.named, *found.others):
        mine, others = _fractions(match.cell), _fractions(match.baseline)
        for what, value in mine.items():
            if what in others and abs(value - others[what]) > 1e-9 + (
                0 if what == "evaluations" else _step(match.cell)
            ):
                said = f"{match.name} has {what} {value:.4g} and its baseline {others[what]:.4g}"
                remedy = "give both the same fractions of their schedules"
                yield Finding("violation", "schedule", said, _names(match.cell), remedy)


def same_start(study: Study, records: Sequence[Record]) -> Iterator[Finding]:
    """Of one seed all points share what decides initial weights and data order."""
    planned = {point.name: point for point in study.points}
    for kind in ("weights", "data"):
        by_seed: dict[int, dict[int, str]] = {}
        for record in records:
            if record["point"] in planned and (seed := (record.get("seeds") or {}).get(kind)) is not None:
                by_seed.setdefault(record["seed"], {})[seed] = record["point"]
        for seed, found in by_seed.items():
            if len(found) > 1:
                what = (
                    f"seed {seed} stands for seeds {', '.join(map(str, sorted(found)))} of {kind}, so nothing is paired"
                )
                remedy = "remove these points' folders and lines, and run them anew"
                yield Finding("violation", "same start", what, tuple(found.values()), remedy)


def _fractions(cell: Cell) -> dict[str, float]:
    """What should be the same of a point and its baseline."""
    schedules = [record["schedule"] for record in cell.records if record.get("schedule")]
    if not schedules:
        return {}
    first = schedules[0]
    found = {"warm-up over steps": first["warmup_steps"] / first["steps"]}
    if isinstance(first.get("evaluations"), int):
        found["evaluations"] = first["evaluations"]
    return found


def _step(cell: Cell) -> float:
    return 1.0 / max(1, min(record["steps"] for record in cell.records))


def _names(cell: Cell) -> tuple[str, ...]:
    return tuple(record["point"] for record in cell.records)
