"""The report of a study: a table over seeds, a figure and how to get them again. A function of the ledger alone."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from moe_dist.config import Config, ModelConfig
from moe_dist.disk import replace_text
from moe_dist.study.answer import against_dropless, dropped_by_chance
from moe_dist.study.cells import Cell, cells
from moe_dist.study.figure import draw
from moe_dist.study.grid import CAPACITY, Scalar, Study, axis_names, show
from moe_dist.study.measure import loss_unit
from moe_dist.study.statistics.paired import pair

_MEASURED = {
    "validation_loss_capped": ("validation loss, capped", "{:.4f}", 1.0),
    "validation_bits_per_byte": ("validation bits/byte", "{:.4f}", 1.0),
    "validation_bits_per_token": ("validation bits/token", "{:.4f}", 1.0),
    "validation_accuracy": ("validation accuracy", "{:.2f} %", 100.0),
    "validation_macro_f1": ("validation macro-F1", "{:.4f}", 1.0),
    "test_accuracy": ("test accuracy", "{:.2f} %", 100.0),
    "test_macro_f1": ("test macro-F1", "{:.4f}", 1.0),
}
"""Names of the ledger that not every run has, with the head of the column and how a number is shown."""


def write_report(study: Study, latest: dict[str, dict[str, Any]]) -> list[Path]:
    """Writes NAME.png, NAME.svg and report.md into the study's folder; returns them, or nothing before any result."""
    grid = cells(study, latest)
    if not any(cell.records for cell in grid):
        return []
    pictures = [study.folder / f"{study.file.name}.{kind}" for kind in ("png", "svg")]
    draw(grid, x_axis(study), pictures)
    page = study.folder / "report.md"
    replace_text(page, markdown(study, latest))
    return [page, *pictures]


def x_axis(study: Study) -> str:
    """The axis that the figure is drawn against: the capacity factor where it is one, else the first."""
    return CAPACITY if CAPACITY in study.file.axes else next(iter(study.file.axes))


def markdown(study: Study, latest: dict[str, dict[str, Any]]) -> str:
    grid, name, path = cells(study, latest), study.file.name, study.path
    finished = sum(len(cell.records) for cell in grid)
    lines = [f"# {name}", "", f"{finished} of {len(study.points)} points have finished.", ""]
    for point in study.points:
        record = latest.get(point.name, {"status": "not run to its end yet", "reason": ""})
        if record["status"] != "finished":
            lines.append(f"- {point.name}: {record['status']} {record['reason']}".rstrip())
    lines += ["", f"![{name}]({name}.png)", "", *table(study, grid), "", _legend(grid), ""]
    lines += [*against_dropless(study, grid), ""]
    lines += ["## Again", "", "```", f"moe-dist study run {path}", f"moe-dist study report {path}", "```", ""]
    lines += ["## Setting", "", *_setting(study, grid), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def table(study: Study, grid: Sequence[Cell]) -> list[str]:
    """One row for each combination of the axes."""
    names = axis_names(list(study.file.axes))
    paired = CAPACITY in study.file.axes and None in study.file.axes[CAPACITY]
    measured = {name: how for name, how in _MEASURED.items() if any(cell.values(name) for cell in grid)}
    head = [*names.values(), "seeds", "validation loss", *(["minus dropless"] if paired else [])]
    head += [
        *(title for title, _, _ in measured.values()),
        "training loss",
        "dropped, end",
        "by chance",
        "dropped, whole run",
    ]
    head += ["fullest expert", "step", "rows to experts", "crossing ranks"]
    rows = [head, ["---"] * len(head)]
    configs = {tuple(point.axes.values()): point.config for point in study.points}  # of one seed each
    for cell in grid:
        by_chance = dropped_by_chance(configs[tuple(cell.axes.values())], study.file.ranks)
        row = [label(key, value) for key, value in cell.axes.items()]
        row += [str(len(cell.records)), spread(cell.values("validation_loss"), "{:.4f}")]
        if paired:
            row.append(spread(_minus_dropless(cell, grid), "{:+.4f}"))
        row += [spread(cell.values(name), form, scale) for name, (_, form, scale) in measured.items()]
        row += [
            spread(cell.values("loss"), "{:.4f}"),
            spread(cell.values("drop_rate"), "{:.2f} %", 100),
            spread([] if by_chance is None else [by_chance], "{:.2f} %", 100),
            spread(cell.values("drop_rate_whole_run"), "{:.2f} %", 100),
            spread(cell.values("load_max_over_mean"), "{:.2f}"),
            spread(cell.values("step_seconds"), "{:.1f} ms", 1e3),
            spread(cell.values("dispatch_rows_bytes"), "{:.3f} MB", 1e-6),
            spread(cell.values("dispatch_bytes"), "{:.3f} MB", 1e-6),
        ]
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """mean ± sample standard deviation, as `form` says; the mean alone when all are equal, a dash of none.

    >>> spread([1.0, 2.0, 3.0], "{:.1f} s")
    '2.0 ± 1.0 s'
    """
    if not values:
        return "–"
    mean = form.format(fmean(values) * scale)
    if len(set(values)) == 1:
        return mean
    number, space, unit = mean.partition(" ")
    deviation = form.replace("+", "").format(stdev(values) * scale).partition(" ")[0]
    return f"{number} ± {deviation}{space}{unit}"


def label(key: str, value: Scalar) -> str:
    return "dropless" if key == CAPACITY and value is None else show(value)


def _minus_dropless(cell: Cell, grid: Sequence[Cell]) -> list[float]:
    """Validation loss minus that of the dropless run that shares all else, seed by seed."""
    if cell.axes[CAPACITY] is None:
        return []
    other = next(each for each in grid if each.axes == cell.axes | {CAPACITY: None})
    return list(pair(cell.by_seed("validation_loss"), other.by_seed("validation_loss")).differences.values())


def _legend(grid: Sequence[Cell]) -> str:
    units = dict.fromkeys(loss_unit(record) for cell in grid for record in cell.records)
    return f"Mean ± sample standard deviation over seeds. Losses are in {' and '.join(units)}; {_LEGEND}"


_LEGEND = """validation drops nothing, unless it is capped.

- minus dropless: the difference to the dropless run of the same seed
- dropped: share of assignments, over the last quarter of the run and over all of it
- by chance: what uniform random routing would drop: the rest of the drops is imbalance
- fullest expert: its load over the mean load, before dropping, in the last quarter
- step: median time of an optimizer step
- rows to experts: bytes of kept rows in a step, over all layers and ranks
- crossing ranks: bytes of rows in a step that cross the expert-parallel group in the forward pass, there and back; none
  where every rank holds all experts"""


def _setting(study: Study, grid: Sequence[Cell]) -> list[str]:
    configs, records = [point.config for point in study.points], [record for cell in grid for record in cell.records]
    rows: dict[str, str | list[str]] = {
        "study": str(study.path),
        "base": os.path.normpath(study.path.parent / study.file.base),
        **{key: show(value) for key, value in study.file.overrides.items()},
        **{key: ", ".join(label(key, value) for value in values) for key, values in study.file.axes.items()},
        "seeds": ", ".join(map(str, study.file.seeds)),
        "ranks": [f"{study.file.ranks}, ep {config.parallel.ep}, tp {config.parallel.tp}" for config in configs],
        "data": [config.data.kind for config in configs],
        "model": [_model(config.model) for config in configs],
        "parameters": [f"{record['parameters']:,}, {record['active_parameters']:,} active" for record in records],
        "training": [_training(config) for config in configs],
        "device": [str(record["device"]) for record in records],
        "revision": [str(record["revision"]) for record in records],
    }
    lines = ["| | |", "|---|---|"]
    for key, value in rows.items():
        lines.append(f"| {key} | {value if isinstance(value, str) else '; '.join(dict.fromkeys(value))} |")
    return lines


def _model(model: ModelConfig) -> str:
    moe = model.moe
    return f"{model.num_layers} layers, d_model {model.d_model}, {moe.num_experts} experts, top_k {moe.top_k}"


def _training(config: Config) -> str:
    train, what = config.train, "texts of up to" if config.task == "classification" else "sequences of"
    return f"{train.steps} steps of {train.global_batch} {what} {train.seq_len} tokens"
