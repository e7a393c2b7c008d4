"""How much of a run's time has gone into steps that count: the effective training time ratio, over all its starts.

    ETTR = seconds in steps that were kept / (seconds since the run was first submitted or started - seconds in a queue)

Kept are the steps that metrics.jsonl has and that were not left out: those that a roll-back or a restart went back over
are forgotten there. Of a run that has ended otherwise than in order, only those up to its newest checkpoint: the others
will be trained again. What else there is (imports, reading data, evaluations, saves, steps that were lost, a process
that is gone until somebody starts it again) is time that has not gone into steps. A run that has finished, or that
nobody has gone on with, ends when it was last seen alive.

Starts are told by events, a JSON line each, of history.jsonl where a supervisor has written it, else of starts.jsonl,
which each run writes:

    {"time": "2026-11-27T17:43:42.120+00:00", "event": "submitted", "job": "12"}
    {"time": ..., "event": "start", "job": "12", "requeued": 1}
    {"time": ..., "event": "end", "job": "12", "next": "requeue"}

A run is in a queue from a submission to its start; from an end after which it is queued again to the next start; and
between two starts of different jobs, or of a job that was queued again, where nothing else is told. Light: no torch.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_dist.disk import lines_backwards
from moe_dist.train.record.history import last_saved_step
from moe_dist.train.record.progress import duration
from moe_dist.train.record.status import FILE as STATUS
from moe_dist.train.record.status import status_now

STARTS, HISTORY = "starts.jsonl", "history.jsonl"
Event = Mapping[str, Any]


@dataclass(frozen=True)
class EffectiveTime:
    """Seconds. wall: since the first submission or start; queued: of them, in a queue. starts: how often it started."""

    kept: float
    wall: float
    queued: float
    starts: int

    @property
    def ratio(self) -> float:
        """From 0 to 1."""
        worked = self.wall - self.queued
        return self.kept / worked if worked > 0 else 0.0

    def describe(self) -> str:
        """`91.2% of 1h02m in steps that were kept, 3 starts; 12m04s in the queue apart`."""
        starts = "1 start" if self.starts == 1 else f"{self.starts} starts"
        queued = f"; {duration(self.queued)} in the queue apart" if self.queued >= 1 else ""
        return f"{self.ratio:.1%} of {duration(self.wall - self.queued)} in steps that were kept, {starts}{queued}"


def effective_time(kept: float, events: Sequence[Event], until: float) -> EffectiveTime | None:
    """kept: seconds in steps that count. events: in order. until: the time, as of time.time, up to which a start that
    has no end has lasted. None where nothing has started."""
    began: float | None = None
    ended: float | None = None
    waiting: float | None = None  # since when
    job: tuple[Any, Any] | None = None
    held, queued, starts = False, 0.0, 0
    for event in events:
        at = datetime.fromisoformat(event["time"]).timestamp()
        began = at if began is None else began
        match event["event"]:
            case "submitted" if not held and waiting is None:
                waiting = at
            case "start":
                mine = (event.get("job"), event.get("requeued"))
                if waiting is None and not held and job is not None and None not in (job[0], mine[0]) and job != mine:
                    waiting = ended
                queued += at - waiting if waiting is not None else 0.0
                held, waiting, job, starts = True, None, mine, starts + 1
            case "end":
                held, ended = False, at
                waiting = at if event.get("next") == "requeue" else None
    if began is None or not starts:
        return None
    end = ended if not held and ended is not None else until
    return EffectiveTime(kept, end - began, queued, starts)


def effective_time_of(folder: Path) -> EffectiveTime | None:
    """Of the run in `folder`, until now; None where nothing is known of its starts."""
    events = read_events(folder / HISTORY)
    if not any(event["event"] == "start" for event in events):
        events = read_events(folder / STARTS)
    state = status_now(folder)["state"]
    until = time.time() if state == "running" else last_sign_of_life(folder)
    saved = None if state in ("running", "finished", "preempted") else last_saved_step(folder)
    return effective_time(kept_seconds(folder, saved), events, until)


def kept_seconds(folder: Path, last_step: int | None = None) -> float:
    """Seconds in the steps of metrics.jsonl that were applied, up to step `last_step`, or all: as its record says. What
    a version that did not say it has trained is left out, as are its starts."""
    for _, line in lines_backwards(folder / "metrics.jsonl"):
        with suppress(ValueError, KeyError, TypeError):  # a torn last line
            record = json.loads(line)
            if last_step is None or record["step"] <= last_step:
                return float(record.get("kept_seconds", 0.0))
    return 0.0


def tell_start(folder: Path) -> None:
    """That this process takes the run up, for starts.jsonl; of the start before, if it has not told its end, the last
    sign of life. To be called before anything else is written; rank 0 alone."""
    events = read_events(folder / STARTS)
    if events and events[-1]["event"] == "start":
        _note(folder, "end", last_sign_of_life(folder))
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0")
    _note(folder, "start", process_began(), requeued=int(requeued) if requeued.isdigit() else 0)


def tell_end(folder: Path) -> None:
    """That this start has ended in order. Rank 0 alone."""
    _note(folder, "end", time.time())


def read_events(path: Path) -> list[Event]:
    """Those of a file, in order; none where it is missing. Lines that are torn are passed over."""
    return list(_events(path)) if path.exists() else []


def _events(path: Path) -> Iterator[Event]:
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            datetime.fromisoformat(event["time"])
            if event["event"] in ("submitted", "start", "end"):
                yield event


def last_sign_of_life(folder: Path) -> float:
    """When the run last wrote a step, a checkpoint or its status, as of time.time."""
    times = [0.0]
    for name in ("metrics.jsonl", "checkpoints", STATUS):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def process_began() -> float:
    """When this process was started, before all imports, as of time.time; now where the system does not say."""
    now = time.time()
    try:
        ticks = int(
            Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, up - ticks / os.sysconf("SC_CLK_TCK"))


def _note(folder: Path, event: str, at: float, **details: Any) -> None:
    """On the disk when this returns."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    line = {"time": when, "event": event, "job": os.environ.get("SLURM_JOB_ID"), **details}
    with (folder / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
