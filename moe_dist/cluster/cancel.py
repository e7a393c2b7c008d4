"""`moe-dist cancel`: a job of a run ends for good, and nothing of the run is lost.

The run's history is told first, so that the job's supervisor neither starts it again nor queues it; then the ranks are
asked to save as before a time limit (SIGUSR2). What still runs after that is ended by scancel, whose SIGTERM asks the
ranks to save once more, in the 30 seconds (KillWait) that most clusters give them.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

from moe_dist.cluster import history
from moe_dist.cluster.queue import state_of
from moe_dist.config.values import user_path
from moe_dist.parallel.slurm import ask

_POLL = 1.0  # seconds


def cancel(own: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """own: of cancel_arguments. Returns the exit code, 0. Raises ValueError when the queue has
    no such job, or when Slurm refuses."""
    job, folder = _job(own.what)
    state = state_of(job)
    if state is None:
        raise ValueError(f"job {job} neither waits nor runs: there is nothing to cancel")
    if state != "PENDING":
        folder = folder or _run_of(job)
        if folder is None:
            ask("scontrol", "update", f"JobId={job}", "Requeue=0")
        else:
            history.append(folder, "cancel", job=job)
        ask("scancel", "--signal=USR2", job)
        say(f"job {job}: asked to save; it is cancelled in {own.seconds} s if it has not ended")
        end = time.monotonic() + own.seconds
        while state_of(job) is not None and time.monotonic() < end:
            time.sleep(_POLL)
    if state_of(job) is None:
        say(f"job {job} has ended")
    else:
        ask("scancel", job)
        say(f"job {job} is cancelled")
    return 0


def _job(what: str) -> tuple[str, Path | None]:
    """With the folder of its run, where that was given. A number is one of a job, also where a folder has that name:
    then write ./NUMBER."""
    if re.fullmatch(r"\d+(_\d+)?", what, re.ASCII):
        return what, None
    folder = user_path(what)
    job = history.job_of(history.read(folder))
    if job is None:
        raise ValueError(
            f"{what} is neither the number of a job nor the folder of a run that was in one: moe-dist status ROOT "
            "lists those under ROOT"
        )
    return job, folder


def _run_of(job: str) -> Path | None:
    """As `moe-dist submit` noted it in the job's comment; None for a job that was handed in otherwise."""
    comment = ask("squeue", "--noheader", f"--jobs={job}", "--format=%k").strip()
    return Path(comment) if (Path(comment) / history.FILE).is_file() else None
