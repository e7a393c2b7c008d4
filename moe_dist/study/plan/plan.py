"""`moe-dist study plan`: what a study will train, cost and be able to show, before it does.

| number          | from                                                                                              |
|-----------------|---------------------------------------------------------------------------------------------------|
| FLOPs, bytes    | the configurations (planned.py): the most that can be spent                                       |
| time            | the probe (probe.py): start, steps and evaluations of each point, over `at_once`                  |
| disk            | 12 bytes a parameter (weights and two moments in fp32) times the checkpoints kept, and the        |
|                 | probe's bytes a step for metrics                                                                  |
| smallest effect | statistics/power.py, at a power of 80%, over the family that the question names; the spread of    |
|                 | paired differences is that of points that have finished, a pilot, else what the question expects  |
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_dist.config import Config
from moe_dist.models.parameters import classifier_parameter_counts, parameter_counts
from moe_dist.study.design.family import Axes, comparisons
from moe_dist.study.design.grid import Point, Study, load_study
from moe_dist.study.design.planned import planned_crossing_bytes, planned_flops, planned_rows_bytes, planned_tokens
from moe_dist.study.design.probe import Command, Probe, extremes, machine, measure_probe, read_probe, write_probe
from moe_dist.study.ledger.cells import Cell, cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.statistics.paired import pair
from moe_dist.study.statistics.power import minimum_detectable, noise_floor, power
from moe_dist.study.statistics.samples import FEWEST_SEEDS

_BYTES_OF_A_PARAMETER = 12
_MOST_SEEDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class PointCost:
    """What one point is planned to spend; over all ranks. seconds, record_bytes: None without a probe."""

    name: str
    axes: Axes
    steps: int
    warmup_steps: int
    tokens: float
    flops: float
    rows_bytes: float
    crossing_bytes: float
    seconds: float | None
    checkpoint_bytes: float
    record_bytes: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What the seeds can show.

    comparisons: of the question's family. seeds: of each; pairs of seeds count as independent ones. spread: standard
    deviation over seeds of the difference to the baseline; source: `pilot` or `question`. detectable: the smallest
    effect that 80 of 100 studies show. power: share of studies that show the question's smallest difference.
    seeds_needed: how many seeds show it in 80 of 100; None above a thousand. missing: why there is nothing to say.
    """

    metric: str
    comparisons: int
    seeds: int
    spread: float | None = None
    source: str | None = None
    detectable: float | None = None
    smallest_difference: float | None = None
    power: float | None = None
    seeds_needed: int | None = None
    missing: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that is printed. residual: the largest share by which a point misses the budget. untimed: why there is no
    time."""

    study: Study
    points: list[PointCost]
    finished: int
    residual: float | None
    probe: Probe | None
    untimed: str | None
    seconds: float | None
    seconds_left: float | None
    effect: Effect | None

    def dumps(self) -> str:
        """As JSON, with every point."""
        study = self.study
        values: dict[str, Any] = {
            "name": study.file.name,
            "folder": str(study.folder),
            "axes": study.file.all_axes,
            "seeds": study.file.repetitions,
            "excluded": study.left_out,
            "invalid": [asdict(each) for each in study.invalid],
            "equal": study.file.equal,
            "at_once": study.file.at_once,
        }
        values |= {name: getattr(self, name) for name in "finished residual untimed seconds seconds_left".split()}
        values |= {
            name: asdict(each) if each else None for name, each in (("probe", self.probe), ("effect", self.effect))
        }
        values["points"] = [asdict(point) for point in self.points]
        return json.dumps(values, indent=1)


def make_plan(path: str | Path, command: Command | None) -> Plan:
    """command: trains the probe's points; None: no probe is measured, and the one that lies there taken if it fits and
    is of this machine.

    Writes probe.json where it has measured. Raises ValueError for a study that is refused as a whole.
    """
    study, untimed = load_study(path, planning=True), None
    ranks, ends = study.file.ranks, extremes([point.config for point in study.points], study.file.ranks)
    probe = _probe_at_hand(study, ends)
    if probe is None and ends and command is not None:
        try:
            at_once = study.file.at_once if study.file.executor == "local" else 1
            probe = measure_probe(ends, ranks, command, at_once)
        except ValueError as error:
            untimed = str(error)
        else:
            write_probe(study.folder, probe)
            study = load_study(path, planning=True)  # `equal: time` knows its steps now
    if probe is None and untimed is None:
        untimed = "nothing has been timed; leave out --no-probe" if ends else "no point is left"
    latest = Ledger(study.ledger).latest()
    done = {name for name, record in latest.items() if record["status"] == "finished"}
    points = [_cost(point, ranks, probe) for point in study.points]
    left = [point for point in points if point.name not in done]
    return Plan(
        study=study,
        points=points,
        finished=len(points) - len(left),
        residual=_residual(study),
        probe=probe,
        untimed=untimed,
        seconds=_seconds(points, study.file.at_once),
        seconds_left=_seconds(left, study.file.at_once),
        effect=_effect(study, cells(study, latest)),
    )


def _probe_at_hand(study: Study, ends: Sequence[Config]) -> Probe | None:
    """Of this machine; and once a point of equal times has begun, of any: another would change the others' steps."""
    probe = read_probe(study.folder)
    if probe is None or not probe.fits(ends, study.file.ranks):
        return None
    begun = study.file.equal == "time" and any(point.folder.exists() for point in study.points)
    return probe if begun or probe.machine == machine() else None


def _residual(study: Study) -> float | None:
    return max(map(abs, study.residuals.values()), default=None)


def _seconds(points: Sequence[PointCost], at_once: int) -> float | None:
    """No shorter than the longest point."""
    each = [point.seconds for point in points if point.seconds is not None]
    if len(each) < len(points):
        return None
    return max(sum(each) / at_once, max(each, default=0.0))


def _cost(point: Point, ranks: int, probe: Probe | None) -> PointCost:
    config = point.config
    steps = config.train.steps
    seconds = None
    if probe is not None:
        evaluations = _evaluations(config) * probe.evaluation_seconds(config)
        seconds = probe.start_seconds + steps * probe.step_seconds(config) + evaluations
    return PointCost(
        name=point.name,
        axes=point.axes,
        steps=steps,
        warmup_steps=config.optim.warmup_steps,
        tokens=planned_tokens(config),
        flops=planned_flops(config, ranks),
        rows_bytes=planned_rows_bytes(config, ranks),
        crossing_bytes=planned_crossing_bytes(config, ranks),
        seconds=seconds,
        checkpoint_bytes=_checkpoints(config) * _BYTES_OF_A_PARAMETER * _parameters(config),
        record_bytes=None if probe is None else steps * probe.bytes_per_step,
    )


def _evaluations(config: Config) -> int:
    run, steps = config.run, config.train.steps
    return run.evaluations if run.evaluations is not None else -(-steps // run.eval_every)


def _checkpoints(config: Config) -> int:
    """That lie in a run's folder at its end."""
    run, steps = config.run, config.train.steps
    saved = {*range(run.save_every, steps + 1, run.save_every), steps}
    kept = set(sorted(saved)[-run.keep_last :])
    if run.keep_every is not None:
        kept |= set(range(run.keep_every, steps + 1, run.keep_every))
    return len(kept) + (run.keep_best and len(saved) > len(kept))


_counted: dict[str, int] = {}


def _parameters(config: Config) -> int:
    """All of a model; the same for every capacity."""
    model = replace(config.model, num_classes=config.model.num_classes or 2)
    key = json.dumps([asdict(model), config.task, config.train.seq_len])
    if key not in _counted:
        length = config.train.seq_len
        classifier = config.task == "classification"
        counts = classifier_parameter_counts(model, length) if classifier else parameter_counts(config.model)
        _counted[key] = counts.total
    return _counted[key]


def _effect(study: Study, grid: Sequence[Cell]) -> Effect | None:
    """None without a question."""
    question = study.file.question
    if question is None:
        return None
    family = comparisons(question, study.cells)
    seeds = len(study.file.repetitions)
    effect = Effect(
        metric=question.metric, comparisons=len(family), seeds=seeds, smallest_difference=question.smallest_difference
    )
    if not family:
        return replace(effect, missing="what the question compares, or its baseline, is among the points refused")
    if seeds < FEWEST_SEEDS:
        return replace(effect, missing=f"fewer than {FEWEST_SEEDS} seeds show nothing; list more")
    found = noise_floor(dict(_differences(question.metric, family, grid)))
    spread, source = (found.deviation, "pilot") if found is not None else (question.spread, "question")
    if spread is None:
        return replace(effect, missing="how differences spread over seeds; run some points, or give question.spread")
    detectable = minimum_detectable(spread, seeds, comparisons=len(family))
    effect = replace(effect, spread=spread, source=source, detectable=detectable)
    if question.smallest_difference is None:
        return effect
    return replace(
        effect,
        power=power(question.smallest_difference, spread, seeds, comparisons=len(family)),
        seeds_needed=_seeds_needed(question.smallest_difference, spread, len(family)),
    )


def _differences(
    metric: str, family: Sequence[tuple[Axes, Axes]], grid: Sequence[Cell]
) -> Iterator[tuple[str, dict[int, float]]]:
    """Of each comparison that finished points allow: point minus baseline by seed."""
    by_axes = {json.dumps(cell.axes): cell.by_seed(metric) for cell in grid}
    for axes, baseline in family:
        yield json.dumps(axes), pair(by_axes[json.dumps(axes)], by_axes[json.dumps(baseline)]).differences


def _seeds_needed(difference: float, spread: float, family: int) -> int | None:
    low, high = FEWEST_SEEDS, FEWEST_SEEDS
    while minimum_detectable(spread, high, comparisons=family) > difference:
        low, high = high + 1, 2 * high
        if high > _MOST_SEEDS:
            return None
    while low < high:
        middle = (low + high) // 2
        if minimum_detectable(spread, middle, comparisons=family) > difference:
            low = middle + 1
        else:
            high = middle
    return high
