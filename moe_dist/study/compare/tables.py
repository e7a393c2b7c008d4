"""The tables of a comparison: how the runs ended, and in what they differ."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_dist.study.compare.runs import Flat, RunRecord
from moe_dist.study.page.model import Table, Value

_LAST_STEPS = 20
_OWN = ("run.name", "run.root")
"""Keys of the configuration that always differ, and change no number."""

_EVALUATED = {
    "validation_loss": "validation loss",
    "validation_loss_capped": "validation loss, capped",
    "validation_bits_per_byte": "bits/byte",
    "validation_bits_per_token": "bits/token",
    "validation_accuracy": "validation accuracy",
    "validation_macro_f1": "validation macro-F1",
    "test_accuracy": "test accuracy",
    "test_macro_f1": "test macro-F1",
}


def ends(runs: Sequence[RunRecord]) -> Table:
    """A row for each run. A column that no run has a number for is left out."""
    measured: dict[str, tuple[str, Callable[[RunRecord], float | None]]] = {
        "training loss": (".4f", lambda run: _mean(run.values("loss")[-_LAST_STEPS:])),
    }
    for name, title in _EVALUATED.items():
        measured[title] = (".2%" if "accuracy" in name else ".4f", _last(name))
    measured |= {
        "dropped": (".2%", lambda run: _mean(run.last_quarter("drop_rate"))),
        "fullest expert": (".2f", lambda run: _mean(run.last_quarter("load_max_over_mean"))),
        "step (ms)": (",.1f", lambda run: _median(run.values("step_seconds"), 1e3)),
        "tokens/s": (",.0f", lambda run: _median(run.values("tokens_per_second"))),
        "TFLOP/s": (".3g", lambda run: _median(run.values("tflops"))),
        "memory (MB)": (",.0f", lambda run: _most(run.values("memory_bytes"), 1e-6)),
        "training (s)": (",.0f", lambda run: float(sum(run.values("step_seconds"))) or None),
        "skipped steps": (",d", lambda run: run.skipped or None),
    }
    found = {title: [of(run) for run in runs] for title, (_, of) in measured.items()}
    found = {title: values for title, values in found.items() if any(value is not None for value in values)}
    rows: list[list[Value]] = []
    for place, run in enumerate(runs):
        steps = run.config.get("train.steps")
        rows.append([run.label, run.state, run.last, steps, *(values[place] for values in found.values())])
    return Table(
        name="ends",
        title="Last evaluations, and the last steps",
        columns=["run", "state", "step", "of", *found],
        rows=rows,
        formats={"step": ",d", "of": ",d"} | {title: measured[title][0] for title in found},
        note=_note(runs),
    )


def differences(name: str, title: str, runs: Sequence[RunRecord], of: Callable[[RunRecord], Flat]) -> Table | None:
    """The keys in which the runs differ, against the runs, with whichever are fewer across; None where they agree."""
    flats = [of(run) for run in runs]
    keys = dict.fromkeys(key for each in flats for key in each if key not in _OWN)
    found = {key: [_shown(each, key) for each in flats] for key in sorted(keys, key=_section)}
    found = {key: values for key, values in found.items() if len(set(values)) > 1}
    names = [run.label for run in runs]
    if not found:
        return None
    if len(names) <= len(found):
        return Table(name=name, title=title, columns=["key", *names], rows=[[key, *row] for key, row in found.items()])
    rows = [[label, *(values[place] for values in found.values())] for place, label in enumerate(names)]
    return Table(name=name, title=title, columns=["run", *found], rows=rows)


def setting(runs: Sequence[RunRecord]) -> Table:
    """Where the runs lie, and what they ran on."""
    keys = {"device": "device", "ranks": "layout.world", "revision": "revision", "torch": "packages.torch"}
    rows = [[run.label, str(run.folder), *(_shown(run.environment, key) for key in keys.values())] for run in runs]
    return Table(name="setting", title="Setting", columns=["run", "folder", *keys], rows=rows)


def _note(runs: Sequence[RunRecord]) -> str:
    units = " and ".join(dict.fromkeys(run.unit for run in runs))
    return (
        f"Losses in {units}; training loss: mean of the last {_LAST_STEPS} steps; evaluations: the last of each run. "
        "`dropped` (share of assignments) and `fullest expert` (its load over the mean, in the worst layer): means "
        "over the last quarter of the steps. Step time and rates are medians, memory is the most of any step, "
        "`training` the sum of the step times."
    )


def _section(key: str) -> str:
    return key.split(".")[0]


def _shown(values: Flat, key: str) -> str | None:
    """As a configuration file writes it; None where there is no such key."""
    if key not in values:
        return None
    value: Any = values[key]
    return value if isinstance(value, str) else json.dumps(value)


def _last(name: str) -> Callable[[RunRecord], float | None]:
    return lambda run: float(run.values(name)[-1]) if name in run.curves else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: np.ndarray, scale: float = 1.0) -> float | None:
    return float(np.median(values)) * scale if len(values) else None


def _most(values: np.ndarray, scale: float) -> float | None:
    return float(values.max()) * scale if len(values) else None
