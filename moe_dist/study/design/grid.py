"""The points that follow from a study's file, each with its configuration.

A point is a combination of the axes' values with one of the seeds. Points are numbered with the seeds varying fastest,
and named by what tells them apart: capacity_factor=0.5-seed=0.

| the study sets                       | to                                                                          |
|--------------------------------------|-----------------------------------------------------------------------------|
| train.seed                           | the seed, of the initial weights where it has a seed of its own             |
| train.data_seed                      | the seed of the data, where it has one of its own                           |
| train.steps, optim.warmup_steps      | what `equal` asks for (budget.py)                                           |
| run.evaluations                      | `evaluations`                                                               |
| eval_capacity_factor, where null     | the factor in force at the end of training, so that one checkpoint is       |
|                                      | evaluated with and without drops (not under expert_choice: nobody drops)    |
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config import Config, MoEConfig, validate
from moe_dist.config.load import load_config
from moe_dist.config.parse import field_types, parse_as, parse_dict
from moe_dist.config.read import read_yaml
from moe_dist.config.rules.parts import refuse
from moe_dist.config.values import user_path
from moe_dist.study.design.family import Axes, comparisons
from moe_dist.study.design.file_rules import file_rules, metric_rule, settings
from moe_dist.study.design.names import CAPACITY, Scalar, axis_names, file_safe, in_words, show, value_label
from moe_dist.study.design.study_file import StudyFile, base_path, combinations, excluded, labelled, raw_axes

if TYPE_CHECKING:
    from moe_dist.study.design.budget import Budget

__all__ = [
    "CAPACITY",
    "Invalid",
    "Point",
    "Scalar",
    "Study",
    "StudyFile",
    "axis_names",
    "in_words",
    "load_study",
    "show",
]

_SOURCE = "point: "  # opens every line that parse_dict complains with
_LONGEST_NAME = 200  # a file system's is 255 bytes


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the grid. Everything about it is in `folder`; `run` is the run's own (train/record/run_folder.py).

    axes: of a section or of keys that vary together, the label. seed: one number for each repetition: where weights and
    data have seeds of their own, the number of the pair. seeds: {"weights": 0, "data": 0}.
    """

    index: int
    name: str
    axes: dict[str, Scalar]
    seed: int
    config: Config
    folder: Path
    seeds: dict[str, int]

    @property
    def run(self) -> Path:
        return self.folder / self.config.run.name


@dataclass(frozen=True, slots=True)
class Invalid:
    """A point whose configuration is refused."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """A study that has been checked: the configuration of every one of `points` is valid on `ranks` ranks.

    invalid: only for `plan`; else there is none. left_out: points that `exclude` matches. residuals: by which share
    each point misses the budget that is to be equal; empty without one.
    """

    path: Path
    file: StudyFile
    points: tuple[Point, ...]
    invalid: tuple[Invalid, ...] = ()
    left_out: int = 0
    residuals: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return user_path(self.file.root) / self.file.name

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def cells(self) -> list[Axes]:
        """The combinations of the axes that have points, in order."""
        return list({tuple(point.axes.items()): point.axes for point in self.points}.values())

    def point(self, index: int) -> Point:
        """Raises ValueError when there is no such point."""
        if not 0 <= index < len(self.points):
            raise ValueError(f"point {index} is not one of 0 to {len(self.points) - 1} of {self.path}")
        return self.points[index]


def load_study(path: str | Path, *, planning: bool = False) -> Study:
    """The study in the YAML file `path`. Raises one ValueError that lists every problem of the file and its points.

    planning: points that are refused are listed in `Study.invalid` in place of that, and where `equal: time` has no
    probe yet, points have the steps of the base.
    """
    path = user_path(str(path))
    file = parse_as(StudyFile, read_yaml(path), str(path))
    if problems := [f"{path}: {problem}" for problem in file_rules(file)]:
        raise ValueError("\n".join(problems))
    study = _study(path, file, load_config(base_path(file, path)), planning)
    if study.invalid and not planning:
        raise ValueError("\n".join(f"{path}: {line}" for line in _refusals(study)))
    question = study.file.question
    if question and study.points and not study.invalid and not comparisons(question, study.cells):
        raise ValueError(
            f"{path}: question compares nothing: no point that is left shares all else with one that has its baseline; "
            "change question.baseline, question.compare or exclude"
        )
    if question and study.points:
        refuse(f"{path}: {problem}" for problem in metric_rule(question.metric, {p.config.task for p in study.points}))
    return study


@dataclass(frozen=True, slots=True)
class _Draft:
    """A point before its budget and its folder are known."""

    name: str
    axes: dict[str, Scalar]
    number: int
    seeds: dict[str, int]
    config: Config
    sets_warmup: bool


def _study(path: Path, file: StudyFile, base: Config, planning: bool) -> Study:
    reasons = defaultdict[str, list[str]](list)  # of points that are refused
    names: list[str] = []
    drafts: list[_Draft] = []
    for values, name, number, seeds in _grid(file):
        names.append(name)
        try:
            drafts.append(_draft(file, base, values, name, number, seeds))
        except ValueError as error:
            reasons[name] += str(error).splitlines()
    if twice := [
        f"{path}: {times} points would be called {name}; spell their values otherwise"
        for name, times in Counter(names).items()
        if times > 1
    ]:
        raise ValueError("\n".join(twice))
    budget = _budget(path, file, base, [draft.config for draft in drafts], planning)
    points: list[Point] = []
    residuals: dict[str, float] = {}
    first: dict[str, str] = {}  # a configuration, not yet with its own folder -> the point that has it
    for draft in drafts:
        try:
            config = _finished(draft, file, budget)
        except ValueError as error:
            reasons[draft.name] += str(error).splitlines()
            continue
        twin = first.setdefault(json.dumps(asdict(config)), draft.name)
        if twin != draft.name:
            reasons[draft.name].append(f"is {twin} over again: values such as 1 and 1.0 are equal; keep one")
            continue
        if budget is not None:
            residuals[draft.name] = budget.residual(config)
        folder = user_path(file.root) / file.name / draft.name
        config = replace(config, run=replace(config.run, root=str(folder), name="run"))
        points.append(Point(len(points), draft.name, draft.axes, draft.number, config, folder, draft.seeds))
    invalid = tuple(Invalid(name, tuple(reasons[name])) for name in names if name in reasons)
    return Study(path, labelled(file), tuple(points), invalid, file.size - len(names), residuals)


def _grid(file: StudyFile) -> Iterator[tuple[dict[str, Any], str, int, dict[str, int]]]:
    """(values of the axes, name, seed, seeds) of every point that is not excluded, in order."""
    names = axis_names(list(raw_axes(file)))
    for values in combinations(file):
        if any(excluded(rule, values) for rule in file.exclude):
            continue
        words = [f"{names[axis]}={show(value_label(value))}" for axis, value in values.items()]
        for number, seeds in enumerate(file.repetitions):
            together = isinstance(file.seeds, list)
            told = [f"seed={seeds['weights']}"] if together else [f"{part}={seed}" for part, seed in seeds.items()]
            yield values, file_safe("-".join([*words, *told])), seeds["weights"] if together else number, seeds


def _draft(
    file: StudyFile, base: Config, values: dict[str, Any], name: str, number: int, seeds: dict[str, int]
) -> _Draft:
    """Raises ValueError for a configuration that is refused."""
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"its name has {len(name)} letters, above {_LONGEST_NAME}; shorten labels or take fewer axes")
    chosen: dict[str, Any] = {}
    for axis, value in values.items():
        joint = file.vary_together.get(axis)
        chosen |= settings(axis, value) if joint is None else _all_settings(joint[value])
    own = {"train.seed": seeds["weights"]}
    if not isinstance(file.seeds, list):
        own["train.data_seed"] = seeds["data"]
    config = _configure(base, _all_settings(file.overrides) | chosen | own)
    validate(config, file.ranks)
    axes = {axis: value_label(value) for axis, value in values.items()}
    return _Draft(name, axes, number, seeds, config, "optim.warmup_steps" in chosen)


def _all_settings(keys: dict[str, Any]) -> dict[str, Any]:
    return {inner: each for key, value in keys.items() for inner, each in settings(key, value).items()}


def _configure(base: Config, changes: dict[str, Any]) -> Config:
    values, leaves = asdict(base), field_types(Config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section: Any = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"{key}: {name} is a value, not a section; end the key with {name}")
        if isinstance(section.get(last), dict) and key not in leaves:
            inner = f"{key}.{next(iter(section[last]))}"
            raise ValueError(f"{key}: is a section; name one of its keys, such as {inner}")
        section[last] = value
    try:
        return parse_dict(values, "point")
    except ValueError as error:
        raise ValueError(str(error).replace(_SOURCE, "")) from None


def _budget(path: Path, file: StudyFile, base: Config, points: list[Config], planning: bool) -> "Budget | None":
    """None where nothing is to be equal, and in planning where `equal: time` has no probe yet."""
    if file.equal is None or not points:
        return None
    from moe_dist.study.design.budget import make_budget  # with torch, which `study list` does without
    from moe_dist.study.design.probe import extremes, read_probe

    try:
        reference = _configure(base, _all_settings(file.overrides))
        validate(reference, file.ranks)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: equal={file.equal} asks what base with overrides spends, but that is refused: {reason}"
        ) from None
    if file.equal != "time":
        return make_budget(file.equal, reference, file.ranks)
    probe = read_probe(user_path(file.root) / file.name)
    if probe is not None and probe.fits(extremes(points, file.ranks), file.ranks):
        return make_budget("time", reference, file.ranks, probe.step_seconds)
    if planning:
        return None
    raise ValueError(
        f"{path}: equal=time needs step times of its smallest and largest point; measure them: "
        f"moe-dist study plan {path}"
    )


def _finished(draft: _Draft, file: StudyFile, budget: "Budget | None") -> Config:
    """The configuration with all that the study sets, but its folder. Raises ValueError when it is refused."""
    config = draft.config if budget is None else budget.fit(draft.config, not draft.sets_warmup)
    steps = config.train.steps
    if file.evaluations is not None:
        if file.evaluations > steps:
            raise ValueError(f"evaluations={file.evaluations} is above train.steps={steps}; lower evaluations")
        config = replace(config, run=replace(config.run, evaluations=file.evaluations))
    model, attention = config.model, config.model.attention
    if attention.kind == "switch":
        attention = replace(attention, moe=_evaluated_with_drops(attention.moe, steps))
    config = replace(config, model=replace(model, moe=_evaluated_with_drops(model.moe, steps), attention=attention))
    validate(config, file.ranks)
    return config


def _evaluated_with_drops(moe: MoEConfig, steps: int) -> MoEConfig:
    if moe.num_experts == 0 or moe.router == "expert_choice" or moe.eval_capacity_factor is not None:
        return moe
    factor = moe.factor_at(steps - 1)
    return moe if moe.is_dropless(factor) else replace(moe, eval_capacity_factor=factor)


def refused(study: Study) -> dict[str, list[str]]:
    """Reason -> names of the points that have it."""
    having = defaultdict[str, list[str]](list)
    for point in study.invalid:
        for reason in point.reasons:
            having[reason].append(point.name)
    return having


def _refusals(study: Study) -> Iterator[str]:
    """A line for each reason, with the first point that has it unless all have."""
    total = len(study.points) + len(study.invalid)
    for reason, names in refused(study).items():
        yield reason if len(names) == total else f"{names[0]}: {reason}"
    if len(study.invalid) < total:
        yield (
            f"{len(study.invalid)} of {total} points are refused (moe-dist study plan lists them); "
            "mend them, or leave them out with exclude"
        )
