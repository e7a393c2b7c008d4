"""Does the design support the question? What a study has to be for its answer to hold, checked on the ledger.

| check       | of which points | violated when                                                                        |
|-------------|-----------------|--------------------------------------------------------------------------------------|
| ledger      | all             | a line of the ledger could not be read; a warning once every point has its result    |
| finished    | all             | one failed, or has no result yet                                                     |
| settings    | all             | trained with others than the study gives now; a warning where the line does not say  |
| seeds       | all             | fewer than three, or losses that are the same to the last bit, as of copies          |
| pairs       | compared        | a seed lacks a side, or no baseline shares all else; a warning of what is not asked  |
| budget      | see right       | of all under `equal`: tokens, FLOPs or time differ; else between a point and its     |
|             |                 | baseline the tokens                                                                  |
| schedule    | compared        | warm-up or evaluations are at other fractions; of all: a run left its decay early    |
| evaluations | all             | there is no dropless validation loss; a warning where a capped point lacks its own   |
| steadiness  | all             | steps were skipped or rolled back                                                    |
| software    | all             | versions or revision differ                                                          |
| machine     | all             | host, CPU, threads or device differ: times are not comparable                        |
| times       | all             | a warning where a point's times spread so much over its seeds that they decide less  |
| data        | all             | digests differ                                                                       |
| same start  | of one seed     | seeds of weights or of data order differ                                             |

A violation leads the report and ends `--check` with 1; a warning is said beside the answer.
"""

from collections.abc import Iterator, Mapping, Sequence

from moe_dist.study.design.grid import Study
from moe_dist.study.ledger.cells import Cell, Record
from moe_dist.study.ledger.settings import config_hash, other_settings
from moe_dist.study.report.comparable import budget, pairs, same_start, schedule
from moe_dist.study.report.costs import same_cost
from moe_dist.study.report.finding import SHOWN, Finding, number_of
from moe_dist.study.report.matches import Families
from moe_dist.study.statistics.samples import FEWEST_SEEDS

_UNSTEADY = 0.05
"""Relative difference of times that a quiet machine tells."""
_NOTHING = 0.5
"""From here on, one time may be half of another and count as equal."""

CHECKS = (
    "ledger",
    "finished",
    "settings",
    "seeds",
    "pairs",
    "budget",
    "schedule",
    "evaluations",
    "steadiness",
    "software",
    "machine",
    "times",
    "data",
    "same start",
)


def check(
    study: Study, grid: Sequence[Cell], latest: Mapping[str, Record], found: Families, unreadable: Sequence[str] = ()
) -> list[Finding]:
    """unreadable: what the ledger says of its lines that are none."""
    records = [record for cell in grid for record in cell.records]
    findings = [*_ledger(study, latest, unreadable)]
    findings += _finished(study, latest)
    findings += _settings(study, records)
    findings += _seeds(study, grid)
    findings += pairs(study, found)
    findings += budget(study, records, found)
    findings += schedule(study, records, found)
    findings += _evaluations(study, records)
    findings += _steadiness(records)
    findings += _same_everywhere(records)
    findings += _times(grid)
    findings += same_start(study, records)
    return findings


def _ledger(study: Study, latest: Mapping[str, Record], unreadable: Sequence[str]) -> Iterator[Finding]:
    whole = all(latest.get(point.name, {}).get("status") == "finished" for point in study.points)
    for line in unreadable:
        if whole:
            yield Finding("warning", "ledger", line, (), "remove this line: every point has its result without it")
        else:
            remedy = "run the study again, which records the point anew from its run"
            yield Finding("violation", "ledger", line, (), remedy)


def _finished(study: Study, latest: Mapping[str, Record]) -> Iterator[Finding]:
    states = {point.name: latest.get(point.name, {}).get("status", "missing") for point in study.points}
    failed = tuple(name for name, state in states.items() if state == "failed")
    missing = tuple(name for name, state in states.items() if state not in ("failed", "finished"))
    again = f"run `moe-dist study run {study.path}`"
    if failed:
        yield Finding(
            "violation",
            "finished",
            f"{number_of(failed)} failed and {'is' if len(failed) == 1 else 'are'} left out of all numbers",
            failed,
            f"see why under Failed points, mend it, and {again}",
        )
    if missing:
        has = "has" if len(missing) == 1 else "have"
        yield Finding("violation", "finished", f"{number_of(missing)} {has} no result yet", missing, again)


def _settings(study: Study, records: Sequence[Record]) -> Iterator[Finding]:
    """A folder that was moved is no other setting; nor is another hash, where point.yaml says that all is as it was."""
    known = {record["point"]: record.get("config_hash") for record in records}
    changed = dict[str, dict[str, str]]()
    for point in study.points:
        if known.get(point.name) not in (None, config_hash(point.config)):
            other = other_settings(point, {"config_hash": known[point.name]})
            if own := {key: what for key, what in other.items() if key not in ("run.name", "run.root")}:
                changed[point.name] = own
    if changed:
        first, own = next(iter(changed.items()))
        told = "; ".join(f"{key} {what}" for key, what in list(own.items())[:SHOWN])
        yield Finding(
            "violation",
            "settings",
            f"{number_of(list(changed))} had other settings than the study gives now: {told} of {first}",
            tuple(changed),
            "give the study's file its settings back, or remove these points' folders and lines, and run them anew",
        )
    if unknown := tuple(name for name, told in known.items() if told is None):
        what = "lines of an older version do not say with which settings their points were trained"
        remedy = "see that the study's file has not changed since, or run the points anew"
        yield Finding("warning", "settings", what, unknown, remedy)


def _seeds(study: Study, grid: Sequence[Cell]) -> Iterator[Finding]:
    planned = max((len(cell.points) for cell in grid), default=0)
    if planned < FEWEST_SEEDS:
        yield Finding(
            "violation",
            "seeds",
            f"{planned} of each point, and an interval needs {FEWEST_SEEDS}",
            (),
            "add seeds to the study's file and run it again: what has finished is kept",
        )
        return
    few = tuple(cell.points[0].name for cell in grid if len(cell.records) < FEWEST_SEEDS)
    if few:
        what = f"fewer than {FEWEST_SEEDS} have finished, which give no interval"
        yield Finding("violation", "seeds", what, few, "finish these points")
    copies = tuple(
        cell.points[0].name
        for cell in grid
        if len(losses := cell.values("loss")) > 1 and len(set(losses)) < len(losses)
    )
    if copies:
        what = "seeds have the same training loss to the last bit, so they are one run, and no interval knows it"
        yield Finding("violation", "seeds", what, copies, "see that runs of other seeds are not copies of one")
    pairs = [point.seeds for point in study.points]
    weights, data = ({each[kind] for each in pairs} for kind in ("weights", "data"))
    if len(weights) * len(data) == planned and min(len(weights), len(data)) > 1:
        yield Finding(
            "warning",
            "seeds",
            f"the {planned} repetitions of a point are {len(weights)} seeds of weights by {len(data)} of data order, "
            "which share their noise: intervals take them for independent, and are too narrow",
            (),
            "give every repetition seeds of its own for claims",
        )


def _evaluations(study: Study, records: Sequence[Record]) -> Iterator[Finding]:
    planned = {point.name: point.config.model.moe for point in study.points}
    dropless = tuple(record["point"] for record in records if record.get("validation_loss") is None)
    if dropless:
        remedy = "set run.eval_every or `evaluations`"
        yield Finding("violation", "evaluations", "there is no dropless validation loss", dropless, remedy)
    capped = tuple(
        record["point"]
        for record in records
        if record.get("validation_loss_capped") is None
        and (moe := planned.get(record["point"])) is not None
        and moe.num_experts > 0
        and moe.capacity_factor is not None
        and moe.router != "expert_choice"  # which drops nothing
    )
    if capped:
        what = "there is no validation loss with the capacity in force, which is what a model that drops would serve"
        yield Finding("warning", "evaluations", what, capped, "set model.moe.eval_capacity_factor")


def _steadiness(records: Sequence[Record]) -> Iterator[Finding]:
    for field, what in (("skipped_steps", "skipped steps"), ("roll_backs", "were rolled back")):
        if points := tuple(record["point"] for record in records if record.get(field)):
            remedy = "lower optim.lr or leave the points out: their losses are not of the schedule that they claim"
            yield Finding("violation", "steadiness", what, points, remedy)


def _same_everywhere(records: Sequence[Record]) -> Iterator[Finding]:
    rerun = "run all points under one, or take the difference as part of what is compared"
    kinds = [
        ("software", "revision", "", rerun),
        ("machine", "device", "", "times are not comparable: run all points on one"),
        ("data", "data_digest", "", "the corpora differ: run all points on one"),
    ]
    for section, check in (("versions", "software"), ("machine", "machine")):
        keys = sorted({key for record in records for key in record.get(section) or {}} - {"device"})
        kinds += [(check, key, section, rerun) for key in keys]
    for check, what, section, remedy in kinds:
        values: dict[str, list[str]] = {}
        for record in records:
            home = (record.get(section) or {}) if section else record
            if (value := home.get(what)) is not None:
                values.setdefault(str(value), []).append(record["point"])
        if len(values) > 1:
            rarest = min(values.values(), key=len)
            told = ", ".join(f"{value} of {number_of(points)}" for value, points in list(values.items())[:SHOWN])
            yield Finding("violation", check, f"{what.replace('_', ' ')} differs: {told}", tuple(rarest), remedy)


def _times(grid: Sequence[Cell]) -> Iterator[Finding]:
    if (same := same_cost(grid, "time")) > _UNSTEADY:
        what = f"step times of the seeds of a point differ so much that times within {same:.0%} count as equal"
        if same > _NOTHING:
            what = "step times of the seeds of a point differ so much that times tell nothing here"
        remedy = (
            "losses are not touched by it; decide by what is counted (question.decide_by: flops, bytes or memory), or "
            "run the points again on a machine that does nothing else"
        )
        yield Finding("warning", "times", what, (), remedy)
