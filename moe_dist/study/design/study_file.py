"""A study as its YAML file says it.

    name: capacity-smoke
    base: ../tiny.yaml                                    # from this file's folder
    overrides: {train.steps: 250}                         # the same for every point
    axes: {model.moe.capacity_factor: [0.5, 1.0, null]}   # every combination of the axes' values ...
    seeds: [0, 1, 2]                                      # ... with every seed is a point
    question: {baseline: {model.moe.capacity_factor: null}, smallest_difference: 0.01}

Rules that tie keys together are in file_rules.py; the points that follow from a file in grid.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from moe_dist.config.model import STRICT
from moe_dist.study.design.names import Scalar, means, value_label

METRICS = (
    "loss validation_loss validation_loss_capped validation_bits_per_byte validation_bits_per_token "
    "validation_accuracy validation_accuracy_capped validation_macro_f1 validation_macro_f1_capped "
    "test_loss test_loss_capped test_accuracy test_accuracy_capped test_macro_f1 test_macro_f1_capped "
    "drop_rate drop_rate_whole_run steps_until_few_drops load_max_over_mean step_seconds seconds "
    "dispatch_rows_bytes dispatch_bytes flops_executed memory_bytes"
).split()
"""Numbers of the ledger that a question may be about: lower is better, of accuracy and f1 higher."""


@dataclass(kw_only=True, slots=True)
class Question:
    """What is compared with what, stated before the first run."""

    __pydantic_config__ = STRICT

    baseline: dict[str, Any]
    """Axes with a value each. A point is compared with the one that has these and shares all else. Once read, a section
    is its label."""
    compare: dict[str, list[Any]] = field(default_factory=dict)
    """Axes with the values to compare; of axes not named, all."""
    metric: str = "validation_loss"
    """One of METRICS."""
    smallest_difference: float | None = None
    """That matters, in the metric's unit. null: no difference is called too small to matter."""
    decide_by: Literal["time", "flops", "bytes", "memory"] = "time"
    """The cheapest by this, among those not worse by more than smallest_difference, is recommended."""
    spread: float | None = None
    """Expected standard deviation, over seeds, of the difference to the baseline: for `plan`, before there are runs."""


@dataclass(kw_only=True, slots=True)
class GivenLaw:
    """L = floor + A C^-exponent, loss in nats against compute, as published or fitted elsewhere."""

    __pydantic_config__ = STRICT

    floor: float
    """Loss that no compute goes below."""
    exponent: float
    """Of compute."""


@dataclass(kw_only=True, slots=True)
class StudyFile:
    """The keys of a study's YAML file."""

    __pydantic_config__ = STRICT

    name: str
    """Of the study; its folder is root/name."""
    base: str
    """A run's YAML file, from the folder of the study's file."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted keys of the configuration, each with the values to try. Of a section, mappings whose keys are merged into
    the base's."""
    vary_together: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Axes that set several keys at once: name of the axis, label of a value, dotted keys."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Rules: axes with a value, or a list of values. Points that match all axes of a rule are left out."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the configuration, each with the value that all points share."""
    equal: Literal["tokens", "flops", "time"] | None = None
    """What every point spends as much of as `base` with `overrides`: train.steps follows (budget.py). null: nothing."""
    seeds: list[int] | dict[str, list[int]] = field(default_factory=lambda: [0])
    """train.seed of the repetitions; or {weights: [...], data: [...]}, every pair: train.seed and train.data_seed."""
    evaluations: int | None = None
    """run.evaluations of every point, at equal fractions of its schedule. null: as the base says."""
    ranks: int = 1
    """Processes that train one point."""
    root: str = "runs/studies"
    """From the folder you are in, like run.root."""
    executor: Literal["local", "slurm"] = "local"
    """Who starts points."""
    at_once: int = 1
    """Points at a time."""
    retries: int = 1
    """How often a failed point is tried again."""
    slurm: dict[str, Scalar] = field(default_factory=dict)
    """Options of sbatch, by their long names."""
    question: Question | None = None
    """null: the report is exploratory."""
    law: GivenLaw | None = None
    """By which effective compute and speed are reckoned. null: by that of the study's own ladder, where it has one."""

    @property
    def repetitions(self) -> list[dict[str, int]]:
        """{weights, data} of each, in order."""
        if isinstance(self.seeds, list):
            return [{"weights": seed, "data": seed} for seed in self.seeds]
        pairs = product(self.seeds["weights"], self.seeds["data"])
        return [{"weights": weights, "data": data} for weights, data in pairs]

    @property
    def all_axes(self) -> dict[str, list[Scalar]]:
        """Every axis, those that vary together last, with the labels of its values."""
        return {axis: [value_label(value) for value in values] for axis, values in raw_axes(self).items()}

    @property
    def size(self) -> int:
        """Points, also those that are excluded."""
        seeds = self.seeds if isinstance(self.seeds, list) else [*product(*self.seeds.values())]
        return prod(map(len, raw_axes(self).values())) * len(seeds)


def raw_axes(file: StudyFile) -> dict[str, list[Any]]:
    """Every axis with its values as the file has them."""
    return file.axes | {name: list(labels) for name, labels in file.vary_together.items()}


def combinations(file: StudyFile) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values, as the file has them; also those that are excluded."""
    axes = raw_axes(file)
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def excluded(rule: dict[str, Any], values: dict[str, Any]) -> bool:
    """values: of `combinations`."""
    return all(
        means(given, values[axis]) or (isinstance(given, list) and any(means(each, values[axis]) for each in given))
        for axis, given in rule.items()
    )


def labelled(file: StudyFile) -> StudyFile:
    """With labels in the question, as points have them. file: that broke no rule."""
    if file.question is None:
        return file
    axes = raw_axes(file)

    def name(axis: str, given: Any) -> Scalar:
        return value_label(next(value for value in axes[axis] if means(given, value)))

    question = replace(
        file.question,
        baseline={axis: name(axis, given) for axis, given in file.question.baseline.items()},
        compare={axis: [name(axis, each) for each in given] for axis, given in file.question.compare.items()},
    )
    return replace(file, question=question)


def base_path(file: StudyFile, study: Path) -> Path:
    """study: where the file lies."""
    from moe_dist.config.values import user_path

    return study.parent / user_path(file.base)
