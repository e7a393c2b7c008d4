"""`moe-dist status`: how far a run is; of all runs under a folder also what their jobs have been through.

    run   state             step     loss    left   restarts  ETTR   job
    mine  running           310/500  2.1034  2m10s  3         91.2%  12 RUNNING

left: at the pace of the last steps. restarts: starts after the first, in the same job or another. ETTR: the effective
training time ratio (train/record/effective_time.py). restarts and job are known of runs that slurm/train.sbatch
started. The points of a study are one line, which counts their states. Light: no torch.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from moe_dist.cluster import history
from moe_dist.cluster.queue import states_of
from moe_dist.config.load import load_config
from moe_dist.disk import lines_backwards
from moe_dist.train.record.effective_time import effective_time_of
from moe_dist.train.record.history import last_record
from moe_dist.train.record.progress import duration
from moe_dist.train.record.status import FILE, STUDY, describe_status, folders_with, status_now

_COLUMNS = ("run", "state", "step", "loss", "left", "restarts", "ETTR", "job")
_LATEST = 20  # steps that tell the pace


def status(own: argparse.Namespace) -> int:
    """own: of status_arguments. Returns the exit code, 0. Raises ValueError for a folder that holds no run."""
    folder: Path = own.folder
    if not own.configured and not (folder / "config.yaml").exists():
        print_runs(folder, own.all)
        return 0
    print(describe_status(status_now(folder)))
    effective = effective_time_of(folder)
    if effective is not None:
        print(f"effective training time: {effective.describe()}")
    return 0


def print_runs(root: Path, points: bool = False) -> None:
    """points: a line for each point of a study below `root`. Raises ValueError when there is no run under `root`."""
    found = sorted(folders_with(root, FILE, history.FILE))
    if not found:
        raise ValueError(
            f"{root} holds no config.yaml, so no run, and none lies in it: give root/NAME, or the run's configuration"
        )
    study_of: dict[Path, Path] = {}
    if not points:
        study_of = {folder: study for folder in found if (study := _study_above(folder, root)) is not None}
    rows = dict(_rows_of_runs([folder for folder in found if folder not in study_of]))
    for study in set(study_of.values()):
        rows[study] = _row_of_study([folder for folder in found if study_of.get(folder) == study])
    table = [_COLUMNS, *((str(folder.relative_to(root)), *rows[folder]) for folder in sorted(rows))]
    widths = [max(len(row[at]) for row in table) for at in range(len(_COLUMNS))]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if study_of:
        print("A study is one line; --all lists its points.")


def _study_above(folder: Path, root: Path) -> Path | None:
    """The study below `root` whose point the run in `folder` is."""
    between = [root / each for each in folder.relative_to(root).parents if each.name]
    return next((each for each in between if (each / STUDY).is_file()), None)


def _row_of_study(folders: Sequence[Path]) -> tuple[str, ...]:
    """From state to job."""
    states: Counter[str] = Counter()
    for folder in folders:
        try:
            states[status_now(folder)["state"]] += 1
        except ValueError:
            states["unreadable"] += 1
    told = ", ".join(f"{number} {state}" for state, number in states.most_common())
    return (f"points: {told}", *[""] * (len(_COLUMNS) - 2))


def _rows_of_runs(folders: Sequence[Path]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each with its row, from state to job."""
    lines = {folder: history.read(folder) for folder in folders}
    jobs = {folder: job for folder in folders if (job := history.job_of(lines[folder])) is not None}
    queue = _queue(sorted(set(jobs.values())))
    for folder in folders:
        job = jobs.get(folder, "")
        yield folder, (*_how_far(folder, lines[folder]), f"{job} {queue[job]}" if job in queue else job)


def _queue(jobs: list[str]) -> dict[str, str]:
    """Nothing where Slurm is not: the runs' files say the rest."""
    with suppress(ValueError):
        return states_of(jobs)
    return {}


def _how_far(folder: Path, lines: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """From state to ETTR."""
    try:
        status = status_now(folder)
    except ValueError as error:
        return (" ".join(str(error).split()), "", "", "", "", "")
    steps = None
    with suppress(ValueError, OSError):
        steps = load_config(folder / "config.yaml").train.steps
    step, loss, pace, left = status.get("step", 0), last_record(folder).get("loss"), _pace(folder), ""
    if status["state"] == "running" and pace is not None and steps is not None:
        left = duration(pace * (steps - step))
    started = history.starts(lines)
    time = effective_time_of(folder)
    return (
        status["state"],
        f"{step}/{'?' if steps is None else steps}",
        f"{loss:.4f}" if loss is not None else "",
        left,
        str(started - 1) if started else "",
        "" if time is None else f"{time.ratio:.1%}",
    )


def _pace(folder: Path) -> float | None:
    """Seconds of a step, the median of the last ones."""
    seconds = []
    for _, line in islice(lines_backwards(folder / "metrics.jsonl"), _LATEST):
        with suppress(ValueError, KeyError, TypeError):
            seconds.append(float(json.loads(line)["step_seconds"]))
    return median(seconds) if seconds else None
