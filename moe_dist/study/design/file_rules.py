"""Rules of a study's file, one line each: the value, the rule, the way out."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from moe_dist.config.parse import field_types
from moe_dist.config.schema import Config
from moe_dist.study.design.names import axis_names, means, show, value_label
from moe_dist.study.design.study_file import METRICS, StudyFile, combinations, excluded, raw_axes

_OWN_KEYS = {
    "train.seed": "list seeds under seeds",
    "train.data_seed": "list seeds under seeds, as {weights: [...], data: [...]}",
    "run.name": "a point is named by its axes",
    "run.root": "set root at the top of the study",
}
_SUBMITTED = ("array", "dependency", "parsable", "test-only", "wait", "wrap")
_SIMPLE = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_MOST_POINTS = 100_000


def settings(key: str, value: Any) -> dict[str, Any]:
    """Dotted keys that a setting sets: those of a section, else the key itself.

    >>> settings("model.attention", {"kind": "routed", "routed": {"local_window": 4}})
    {'model.attention.kind': 'routed', 'model.attention.routed.local_window': 4}
    """
    if not isinstance(value, dict) or key in field_types(Config):
        return {key: value}
    return {inner: each for name in value for inner, each in settings(f"{key}.{name}", value[name]).items()}


def file_rules(file: StudyFile) -> Iterator[str]:
    """Every broken rule; those of rules and questions are looked at once the axes are whole."""
    problems = [*_numbers(file), *_seeds(file), *_axes(file), *_together(file), *_keys(file)]
    yield from problems
    if problems:
        return
    if file.size > _MOST_POINTS:
        yield f"the axes and seeds make {file.size} points, above {_MOST_POINTS}; take fewer values"
        return
    yield from _exclude(file)
    yield from _question(file)


def metric_rule(metric: str, tasks: set[str]) -> Iterator[str]:
    """tasks: of a study's points. Every one records the loss; each has numbers that the other's runs never do."""
    texts = metric.startswith("test_") or "accuracy" in metric or "f1" in metric.split("_")
    bits = metric.startswith("validation_bits")
    task = "classification" if texts else "language_modelling" if bits else None
    if task is not None and task not in tasks:
        yield (
            f"question.metric={metric} is only known of task: {task}, which no point has; take validation_loss, or "
            "set the task"
        )


def _numbers(file: StudyFile) -> Iterator[str]:
    if not re.fullmatch(_SIMPLE, file.name):
        yield f"name={file.name!r} is not a simple file name; make it of letters, digits, '.', '_' and '-'"
    for name, low in (("ranks", 1), ("at_once", 1), ("retries", 0), ("evaluations", 1)):
        value = getattr(file, name)
        if value is not None and value < low:
            yield f"{name}={value} is below {low}; set {name} to {low} or more"
    if file.law is not None and file.law.floor < 0:
        yield f"law.floor={file.law.floor:g} is below 0, as no loss is; give the loss that no compute goes below"
    if file.law is not None and file.law.exponent <= 0:
        yield f"law.exponent={file.law.exponent:g} is not above 0; give a of L0 + A C^-a, for example 0.0941"
    for option, value in file.slurm.items():
        if not re.fullmatch(r"[a-z]+(-[a-z]+)*", option):
            yield f"slurm.{option} is not the long name of an option of sbatch; write time, not -t or --time"
        if option in _SUBMITTED:
            yield f"slurm.{option} is set by moe-dist study submit itself; leave it out"
        if value is None or value is False:
            yield f"slurm.{option}={show(value)} says nothing; leave it out (true stands for an option without a value)"


def _seeds(file: StudyFile) -> Iterator[str]:
    if isinstance(file.seeds, list):
        if not file.seeds:
            yield "seeds is empty; list at least one, for example [0]"
        lists = {"seeds": file.seeds}
    else:
        if set(file.seeds) != {"weights", "data"}:
            yield f"seeds has {', '.join(file.seeds) or 'nothing'}; give a list, or {{weights: [0, 1], data: [0, 1]}}"
        lists = {f"seeds.{part}": seeds for part, seeds in file.seeds.items()}
        yield from (
            f"{where} is empty; list at least one, for example [0]" for where, seeds in lists.items() if not seeds
        )
    for where, seeds in lists.items():
        for seed, times in Counter(seeds).items():
            if times > 1:
                yield f"{where} has {seed} {times} times: its points would be the same; list every seed once"


def _axes(file: StudyFile) -> Iterator[str]:
    if not file.axes and not file.vary_together:
        yield "axes is empty; name a key and its values, for example model.moe.capacity_factor: [1.0, null]"
    for key, values in file.axes.items():
        if not values:
            yield f"axes.{key} is empty; list at least one value"
        for name, times in Counter(show(value_label(value)) for value in values).items():
            if times > 1:
                yield f"axes.{key} has {name} {times} times; list every value once"


def _together(file: StudyFile) -> Iterator[str]:
    for name, labels in file.vary_together.items():
        where = f"vary_together.{name}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name in ("seed", "weights", "data"):
            yield f"{where}: {name!r} cannot name an axis; make it of letters, digits and '_', other than seed"
        if not labels:
            yield f"{where} is empty; give each of its values a label and keys"
        wanted: set[str] | None = None
        for each, keys in labels.items():
            if not re.fullmatch(_SIMPLE, each):
                yield f"{where}.{each} is not a simple file name; make it of letters, digits, '.', '_' and '-'"
            found = {inner for key, value in keys.items() for inner in settings(key, value)}
            wanted = found if wanted is None else wanted
            if found != wanted:
                odd = ", ".join(sorted(found ^ wanted))
                yield f"{where}.{each} and {where}.{next(iter(labels))} set other keys: {odd}; set it in every one"
            if not keys:
                yield f"{where}.{each} sets no key; name at least one"


def _keys(file: StudyFile) -> Iterator[str]:
    """No key is set in two places, nor by the study itself."""
    places = _places(file)
    overrides = {inner for key, value in file.overrides.items() for inner in settings(key, value)}
    for keys in [*places.values(), overrides]:
        for key in sorted(keys & _OWN_KEYS.keys()):
            yield f"{key} is set by the study itself; {_OWN_KEYS[key]}"
    for (one, ones), (other, others) in itertools.combinations([*places.items(), ("overrides", overrides)], 2):
        for key in sorted(ones & others):
            at = ["axes" if where == f"axes.{key}" else where for where in (one, other)]
            yield f"{key} is both in {at[0]} and in {at[1]}; keep one"
    for (one, ones), (other, others) in itertools.permutations(places.items(), 2):
        inside = sorted(key for key in others - ones if key.startswith(one.removeprefix("axes.") + "."))
        if inside:
            yield f"{other} sets {inside[0]}, which is inside the section {one}; set it in that section's values"
    if file.equal is not None:
        for where in (where for where, keys in places.items() if "train.steps" in keys):
            yield f"equal={file.equal} sets train.steps, but so does {where}; remove one of them"


def _places(file: StudyFile) -> dict[str, set[str]]:
    """The keys that each axis sets."""
    places = {
        f"axes.{key}": {key} | {inner for value in values for inner in settings(key, value)}
        for key, values in file.axes.items()
    }
    for name, labels in file.vary_together.items():
        keys = {inner for each in labels.values() for key, value in each.items() for inner in settings(key, value)}
        places[f"vary_together.{name}"] = keys
    return places


def _exclude(file: StudyFile) -> Iterator[str]:
    axes, cells, broken = raw_axes(file), list(combinations(file)), False
    for number, rule in enumerate(file.exclude):
        where = f"exclude.{number}"
        problems = [problem for axis, given in rule.items() for problem in _on_axis(file, where, axis, given, axes)]
        if not rule:
            problems = [f"{where} is empty and would leave nothing; name axes and values"]
        if problems:
            broken = True
            yield from problems
            continue
        matched = sum(excluded(rule, values) for values in cells)
        if matched == len(cells):
            yield f"{where} matches every point; name more axes, or remove it"
        elif not matched:
            yield f"{where} matches no point; change it or remove it"
    if file.exclude and not broken and all(any(excluded(rule, values) for rule in file.exclude) for values in cells):
        yield "exclude leaves no point; remove a rule"


def _on_axis(file: StudyFile, where: str, axis: str, given: Any, axes: dict[str, list[Any]]) -> Iterator[str]:
    if axis not in axes:
        near = _nearest(axis, list(axes))
        yield f"{where}.{axis} is not an axis; {near or 'the axes are ' + ', '.join(axes)}"
        return
    values = axes[axis]
    several = isinstance(given, list) and not any(means(given, value) for value in values)
    for each in given if several else [given]:
        if not any(means(each, value) for value in values):
            there = ", ".join(show(value_label(value)) for value in values)
            yield f"{where}.{axis}={show(value_label(each))} is not on its axis; take one of {there}"


def _nearest(axis: str, axes: list[str]) -> str:
    names = axis_names(axes)
    found = [key for key in axes if names[key] == axis] or get_close_matches(axis, axes, n=1)
    return f"did you mean {found[0]}?" if found else ""


def _question(file: StudyFile) -> Iterator[str]:
    question = file.question
    if question is None:
        return
    axes = raw_axes(file)
    if not question.baseline:
        yield f"question.baseline is empty; name an axis and its value, one of {', '.join(axes)}"
    for axis, given in question.baseline.items():
        if isinstance(given, list) and axis in axes and not any(means(given, value) for value in axes[axis]):
            yield f"question.baseline.{axis} is a list; name one value"
            continue
        yield from _on_axis(file, "question.baseline", axis, given, axes)
    for axis, values in question.compare.items():
        if not values:
            yield f"question.compare.{axis} is empty; list values, or leave the axis out for all"
        for each in values:
            yield from _on_axis(file, "question.compare", axis, each, axes)
    if question.metric not in METRICS:
        near = get_close_matches(question.metric, METRICS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"take one of {', '.join(METRICS)}"
        yield f"question.metric={question.metric} is no number that a question can be about; {advice}"
    for name, without in (("smallest_difference", "no smallest one matters"), ("spread", "it is not known")):
        value = getattr(question, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"question.{name}={value} is not above 0; raise it, or leave it out where {without}"
