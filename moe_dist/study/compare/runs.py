"""A run as its folder says, in whatever state it is: curves, load, configuration, environment.

Read line by line: of a step its numbers are kept, and of the experts' load the sums over the last quarter of the steps.
A line that cannot be read (the last one of a run that writes just now, or one that a disk has damaged) is passed over,
and counted but for that last one.
"""

import json
import os
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.config.read import read_yaml
from moe_dist.train.record.status import status_now

Flat = dict[str, Any]
"""Dotted name -> a scalar, or a list as JSON."""


@dataclass(frozen=True, slots=True)
class Curve:
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """curves: by their names in metrics.jsonl, without what is null. load: (layer, "feed_forward" or "attention") ->
    assignments [E] of the last quarter of the steps. steps: lines of metrics.jsonl; last: the last step. skipped: steps
    whose update was left out. unreadable: lines."""

    label: str
    folder: Path
    config: Flat
    environment: Flat
    state: str
    steps: int
    last: int
    curves: dict[str, Curve]
    load: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    skipped: int = 0
    unreadable: int = 0

    @property
    def unit(self) -> str:
        """Of its losses."""
        return "nats/text" if self.config.get("task") == "classification" else "nats/token"

    @property
    def step_tokens(self) -> int:
        """Places for tokens in a step; of a classifier some are padding."""
        return int(self.config.get("train.global_batch", 1)) * int(self.config.get("train.seq_len", 1))

    def values(self, name: str) -> np.ndarray:
        return self.curves[name].values if name in self.curves else np.empty(0)

    def last_quarter(self, name: str) -> np.ndarray:
        values = self.values(name)
        return values[-max(1, len(values) // 4) :]


def read_run(folder: Path, label: str) -> RunRecord:
    """Raises ValueError for a folder that holds no run, or one without a step."""
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not the folder of a run, it holds no config.yaml: give root/NAME")
    if not metrics.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl yet: wait for the run's first step, or leave it out")
    record = _Reading(_count(metrics))
    with metrics.open("rb") as file:
        for line in file:
            record.add(line)
    if record.steps == 0:
        raise ValueError(f"{metrics} has no step that can be read yet: wait for the run's first, or leave it out")
    return RunRecord(
        label=label,
        folder=folder,
        config=flat(read_yaml(folder / "config.yaml")),
        environment=_environment(folder / "environment.json"),
        state=str(status_now(folder)["state"]),
        steps=record.steps,
        last=record.last,
        curves={name: Curve(np.array(steps), np.array(values)) for name, (steps, values) in record.curves.items()},
        load=record.load,
        skipped=record.skipped,
        unreadable=record.unreadable,
    )


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell the folders apart: their paths without what all share, at either end.

    >>> labels([Path("/s/runs/a/run"), Path("/s/runs/b/run")])
    ['a', 'b']
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(parts) == 1:
        return [parts[0][-1]]
    shortest = min(map(len, parts))
    front = next((at for at in range(shortest) if len({each[at] for each in parts}) > 1), shortest)
    back = next((at for at in range(shortest) if len({each[-1 - at] for each in parts}) > 1), shortest)
    names = ["/".join(each[front : len(each) - back]) for each in parts]
    return names if all(names) and len(set(names)) == len(names) else [str(folder) for folder in folders]


def flat(values: Mapping[str, Any], under: str = "") -> Flat:
    found: Flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{under}{key}.")
        else:
            found[f"{under}{key}"] = json.dumps(value) if isinstance(value, list | dict) else value
    return found


class _Reading:
    """What is kept of the lines so far. lines: how many there are, of which the last quarter gives the load."""

    def __init__(self, lines: int) -> None:
        self._lines, self._seen = lines, 0
        self.curves: dict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
        self.load: dict[tuple[int, str], np.ndarray] = {}
        self.steps = self.last = self.skipped = self.unreadable = 0

    def add(self, line: bytes) -> None:
        self._seen += 1
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            self.unreadable += line.endswith(b"\n")  # without an end it is being written
            return
        self.steps, self.last = self.steps + 1, step
        self.skipped += "skipped" in record
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                steps, values = self.curves[name]
                steps.append(step)
                values.append(value)
        if self._seen > self._lines - max(1, self._lines // 4):
            for row in record.get("layers", []):
                self._add_load((row["layer"], row.get("kind", "feed_forward")), np.asarray(row["load"]))

    def _add_load(self, site: tuple[int, str], load_E: np.ndarray) -> None:
        before = self.load.get(site)
        same = before is not None and before.shape == load_E.shape  # else experts have been added
        self.load[site] = before + load_E if before is not None and same else load_E


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _environment(path: Path) -> Flat:
    """Empty for a run that has not written it, or whose file cannot be read: the page says so."""
    try:
        return flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return {}
