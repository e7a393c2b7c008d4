"""`moe-dist status`: how far a run is; of all runs under a folder also what their jobs have been through.

    run   state             step     loss    left   restarts  ETTR   job
    mine  running           310/500  2.1034  2m10s  3         91.2%  12 RUNNING

left: at the pace of the last steps. restarts: starts after the first, in the same job or another. ETTR: the effective
training time ratio (train/record/effective_time.py). restarts and job are known of runs that slurm/train.sbatch
started. Light: no torch.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from moe_dist.cluster import history
from moe_dist.cluster.queue import states_of
from moe_dist.config.load import load_config
from moe_dist.disk import lines_backwards
from moe_dist.train.arguments import run_arguments
from moe_dist.train.record.effective_time import effective_time_of
from moe_dist.train.record.history import last_record
from moe_dist.train.record.progress import duration
from moe_dist.train.record.status import FILE, describe_status, folders_with, status_now

_ABOUT = """Print in one line how far a run is: none, running, interrupted (its process is gone), finished, preempted
or failed, with its last step and its loss, or how it ended; in a second one its effective training time ratio: seconds
in steps that were kept over those since it was first submitted or started, the queue apart.

Takes the folder of a run, or what `moe-dist train` takes, and reads status.json, metrics.jsonl and the starts of the
run. For a folder that holds runs, or without anything for runs/, a table of all of them: state, step, loss, time left,
restarts, effective training time ratio (ETTR), last job.
"""
_COLUMNS = ("run", "state", "step", "loss", "left", "restarts", "ETTR", "job")
_LATEST = 20  # steps that tell the pace


def status(words: list[str]) -> int:
    """Returns the exit code, 0. Raises ValueError for what is neither a run, a folder of runs nor a configuration."""
    folder = Path(words[0] if words else "runs")
    if folder.is_dir():
        if len(words) > 1:
            raise ValueError(
                f"{words[0]} is the folder of a run, and takes no {words[1]}: flags go with a configuration"
            )
        if not (folder / "config.yaml").exists():
            print_runs(folder)
            return 0
    else:
        _, config = run_arguments("status", words, _ABOUT)
        folder = config.run.folder
    print(describe_status(status_now(folder)))
    effective = effective_time_of(folder)
    if effective is not None:
        print(f"effective training time: {effective.describe()}")
    return 0


def print_runs(root: Path) -> None:
    """Raises ValueError when there is no run under `root`."""
    folders = sorted(folders_with(root, FILE, history.FILE))
    if not folders:
        raise ValueError(
            f"{root} holds no config.yaml, so no run, and none lies in it: give root/NAME, or the run's configuration"
        )
    lines = {folder: history.read(folder) for folder in folders}
    jobs = {folder: job for folder in folders if (job := history.job_of(lines[folder])) is not None}
    queue = _queue(sorted(set(jobs.values())))
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for folder in folders:
        job = jobs.get(folder, "")
        told = f"{job} {queue[job]}" if job in queue else job
        rows.append((str(folder.relative_to(root)), *_how_far(folder, lines[folder]), told))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


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
