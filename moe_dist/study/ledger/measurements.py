"""What happened over the course of a point: POINT/measurements.jsonl, made of its run's metrics.jsonl.

At each fraction of the schedule that the run evaluates at (run.evaluations; without it, at each evaluation) one line
for the model and one for each layer with experts says what happened since the fraction before: counts are sums over
those steps, other numbers means; of the validation split, what that evaluation said.

    {"fraction": 0.25, "step": 63, "layer": null, "loss": .., "validation_loss": .., "drop_rate": .., ...}
    {"fraction": 0.25, "step": 63, "layer": 0, "kind": "feed_forward", "drop_rate": .., "load": [E], ...}

The names are those of metrics.jsonl (train/record/metrics.py). A number that the run did not record is null, one that
was not finite does not count.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moe_dist.config import Config
from moe_dist.disk import replacing
from moe_dist.study.ledger.columns import save_columns, written_lines
from moe_dist.train.schedule import evaluation_steps

FILE = "measurements.jsonl"

MODEL = ("loss", "drop_rate", "unserved_rate", "router_entropy", "load_max_over_mean", "step_seconds")
"""Of a model's line, means over steps."""
LAYER_MEANS = ("drop_rate", "unserved_rate", "entropy", "load_max_over_mean")
LAYER_SUMS = (
    "load",
    "dropped_by_expert",
    "dropped_by_place",
    "dropped_by_micro_step_place",
    "load_by_frequency",
    "dropped_by_frequency",
    "over_budget_by_pool",
)
"""Of a layer's line, each a list."""


class Measurements:
    """Given the records of a run, one after the other, `lines` are those of measurements.jsonl."""

    def __init__(self, config: Config) -> None:
        self.lines: list[dict[str, Any]] = []
        self._steps, number = config.train.steps, config.run.evaluations
        self._fractions: dict[int, float] | None = None
        if number is not None:
            ends = evaluation_steps(self._steps, number)
            self._fractions = {step: index / number for index, step in enumerate(ends, start=1)}
        self._begin()

    def add(self, record: dict[str, Any]) -> None:
        """The next line of metrics.jsonl."""
        self._model.add(record, MODEL)
        for row in record.get("layers", []):
            self._layers.setdefault((row["layer"], row["kind"]), _Sums()).add(row, LAYER_MEANS, LAYER_SUMS)
        step = record["step"]
        if self._fractions is None:
            if "validation_loss" in record:
                self._end(step / self._steps, record)
        elif step in self._fractions:
            self._end(self._fractions[step], record)

    def _begin(self) -> None:
        self._model, self._layers = _Sums(), dict[tuple[int, str], _Sums]()

    def _end(self, fraction: float, record: dict[str, Any]) -> None:
        place = {"fraction": fraction, "step": record["step"]}
        evaluated = {name: value for name, value in record.items() if name.startswith(("validation_", "test_"))}
        unknown = {"validation_loss": None, "validation_loss_capped": None}
        self.lines.append(place | {"layer": None} | self._model.means(MODEL) | unknown | evaluated)
        for (layer, kind), sums in self._layers.items():
            self.lines.append(place | {"layer": layer, "kind": kind} | sums.means(LAYER_MEANS) | sums.lists())
        self._begin()


def write_measurements(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """The whole file at once: a reader sees all of it or what was there before. And the same as arrays (columns.py)."""
    data = written_lines(lines)
    with replacing(path) as file:
        file.write(data)
    save_columns(path.with_suffix(".npz"), lines, data)


class _Sums:
    """Numbers and lists by name, added up; and how many were finite."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[float]] = {}
        self._lists: dict[str, np.ndarray] = {}

    def add(self, row: dict[str, Any], numbers: Sequence[str], lists: Sequence[str] = ()) -> None:
        for name in numbers:
            if row.get(name) is not None:
                self._numbers.setdefault(name, []).append(row[name])
        for name in lists:
            if name in row:
                self._lists[name] = self._lists.get(name, 0) + np.array(row[name], np.int64)

    def means(self, names: Sequence[str]) -> dict[str, float | None]:
        return {name: fmean(self._numbers[name]) if name in self._numbers else None for name in names}

    def lists(self) -> dict[str, list[int]]:
        return {name: values.tolist() for name, values in self._lists.items()}
