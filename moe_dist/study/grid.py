"""What a study is: a base configuration, axes to vary, seeds; and the grid of points that follows from them.

    name: capacity-smoke
    base: ../tiny.yaml                                    # from this file's folder
    overrides: {train.steps: 250}                         # the same for every point
    axes: {model.moe.capacity_factor: [0.5, 1.0, null]}   # every combination of the axes' values ...
    seeds: [0, 1, 2]                                      # ... with every seed is a point

Points are numbered with the seeds varying fastest, and named by what tells them apart: capacity_factor=0.5-seed=0.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from moe_dist.config import Config, validate
from moe_dist.config.load import dump_config, load_config
from moe_dist.config.model import STRICT
from moe_dist.config.parse import parse_as, parse_dict
from moe_dist.config.read import read_yaml
from moe_dist.config.schema import RunConfig
from moe_dist.config.values import user_path

Scalar = bool | int | float | str | None
CAPACITY = "model.moe.capacity_factor"

_SOURCE = "point: "  # opens every line that parse_dict complains with
_OWN_KEYS = {
    "train.seed": "list seeds under seeds",
    "run.name": "a point is named by its axes",
    "run.root": "set root at the top of the study",
}
_SUBMITTED = ("array", "dependency", "parsable", "test-only", "wait", "wrap")


@dataclass(kw_only=True, slots=True)
class StudyFile:
    """The keys of a study's YAML file."""

    __pydantic_config__ = STRICT

    name: str
    """Of the study; its folder is root/name."""
    base: str
    """A run's YAML file, from the folder of the study's file."""
    axes: dict[str, list[Scalar]]
    """Dotted keys of the configuration, each with the values to try."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of the configuration, each with the value that all points share."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """train.seed of the repetitions."""
    ranks: int = 1
    """Processes of this machine that train one point."""
    root: str = "runs/studies"
    """From the folder you are in, like run.root."""
    executor: Literal["local", "slurm"] = "local"
    """Who runs the points: `moe-dist study run` itself, or Slurm, by way of `moe-dist study submit`."""
    at_once: int = 1
    """Points at a time."""
    retries: int = 1
    """How often a point that has failed is tried again."""
    slurm: dict[str, Scalar] = field(default_factory=dict)
    """Options of sbatch by their long names; true for one that takes no value."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the grid. Everything about it is in `folder`; `run` is the run's own (train/record/run_folder.py)."""

    index: int
    name: str
    axes: dict[str, Scalar]
    seed: int
    config: Config
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / self.config.run.name


@dataclass(frozen=True, slots=True)
class Study:
    """A study that has been checked: every point's configuration is valid on `ranks` ranks."""

    path: Path
    file: StudyFile
    points: tuple[Point, ...]

    @property
    def folder(self) -> Path:
        return user_path(self.file.root) / self.file.name

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    def point(self, index: int) -> Point:
        """Raises ValueError when there is no such point."""
        if not 0 <= index < len(self.points):
            raise ValueError(f"point {index} is not one of 0 to {len(self.points) - 1} of {self.path}")
        return self.points[index]


def load_study(path: str | Path) -> Study:
    """The study in the YAML file `path`. Raises one ValueError that lists every problem of the file and its points."""
    path = user_path(str(path))
    file = parse_as(StudyFile, read_yaml(path), str(path))
    if problems := [f"{path}: {problem}" for problem in _rules(file)]:
        raise ValueError("\n".join(problems))
    base = load_config(path.parent / user_path(file.base))
    points, wrong = [], defaultdict[str, list[str]](list)  # problem -> the points that have it
    first: dict[str, str] = {}  # what makes a run, but where it lies -> the point that is it
    for index, (axes, seed, name) in enumerate(_grid(file)):
        folder = user_path(file.root) / file.name / name
        try:
            config = _configure(base, file.overrides | axes, seed, folder)
            validate(config, file.ranks)
        except ValueError as error:
            for line in str(error).splitlines():
                wrong[line.removeprefix(_SOURCE)].append(name)
            continue
        points.append(Point(index, name, axes, seed, config, folder))
        twin = first.setdefault(dump_config(replace(config, run=RunConfig())), name)
        if twin != name:
            wrong[f"is {twin} over again: values such as 1 and 1.0 are equal; keep one"].append(name)
    if wrong:
        total = sum(1 for _ in _grid(file))
        lines = (line if len(names) == total else f"{names[0]}: {line}" for line, names in wrong.items())
        raise ValueError("\n".join(f"{path}: {line}" for line in lines))
    return Study(path, file, tuple(points))


def axis_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest ending that no other key has: model.moe.top_k is `top_k`."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = {}
    for key in keys:
        parts = 1
        while sum(ending(other, parts) == ending(key, parts) for other in keys) > 1:
            parts += 1
        names[key] = ending(key, parts)
    return names


def in_words(axes: Mapping[str, Scalar], names: Mapping[str, str]) -> str:
    """The values of some axes. names: of `axis_names`."""
    return ", ".join(f"{names[key]} {show(value)}" for key, value in axes.items())


def show(value: Scalar) -> str:
    """A value as YAML spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _grid(file: StudyFile) -> Iterator[tuple[dict[str, Scalar], int, str]]:
    """(axes, seed, name) of every point, in order."""
    names = axis_names(list(file.axes))
    for values in product(*file.axes.values()):
        axes = dict(zip(file.axes, values, strict=True))
        for seed in file.seeds:
            parts = [f"{names[key]}={show(value)}" for key, value in axes.items()] + [f"seed={seed}"]
            yield axes, seed, re.sub(r"[^A-Za-z0-9._=+-]", "_", "-".join(parts))


def _configure(base: Config, changes: dict[str, Any], seed: int, folder: Path) -> Config:
    values = asdict(base)
    for key, value in (changes | {"train.seed": seed, "run.root": str(folder), "run.name": "run"}).items():
        *sections, last = key.split(".")
        section: Any = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"{key}: {name} is a value, not a section; end the key with {name}")
        if isinstance(section.get(last), dict):
            inner = f"{key}.{next(iter(section[last]))}"
            raise ValueError(f"{key}: is a section; name one of its keys, such as {inner}")
        section[last] = value
    return parse_dict(values, "point")


def _rules(file: StudyFile) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", file.name):
        yield f"name={file.name!r} is not a simple file name; make it of letters, digits, '.', '_' and '-'"
    if file.ranks < 1:
        yield f"ranks={file.ranks} is below 1; set ranks to 1 or more"
    if file.at_once < 1:
        yield f"at_once={file.at_once} is below 1; set how many points may run at a time, for example 1"
    if file.retries < 0:
        yield f"retries={file.retries} is below 0; 0 tries each point once"
    for option, value in file.slurm.items():
        if not re.fullmatch(r"[a-z]+(-[a-z]+)*", option):
            yield f"slurm.{option} is not the long name of an option of sbatch; write time, not -t or --time"
        if option in _SUBMITTED:
            yield f"slurm.{option} is set by moe-dist study submit itself; leave it out"
        if value is None or value is False:
            yield f"slurm.{option}={show(value)} says nothing; leave it out (true stands for an option without a value)"
    if not file.seeds:
        yield "seeds is empty; list at least one, for example [0]"
    if not file.axes:
        yield "axes is empty; name a key and its values, for example model.moe.capacity_factor: [1.0, null]"
    for key in [*file.axes, *file.overrides]:
        if key in _OWN_KEYS:
            yield f"{key} is set by the study itself; {_OWN_KEYS[key]}"
    for key in file.axes:
        if not file.axes[key]:
            yield f"axes.{key} is empty; list at least one value"
        if key in file.overrides:
            yield f"{key} is both in axes and in overrides; keep one"
    names = Counter(name for _, _, name in _grid(file))
    for name, times in names.items():
        if times > 1:
            yield f"{times} points would be called {name}; list every value and every seed once"
