"""history.jsonl in the folder of a run: every time that a job took it up, and how each of these starts ended.

    {"time": "2026-11-27T17:43:42.120+00:00", "event": "submitted", "job": "12"}
    {"time": ..., "event": "start", "start": 1, "job": "12", "requeued": 0, "nodes": ["node1", "node2"], "step": 0,
     "saved": 0}
    {"time": ..., "event": "end", "start": 1, "job": "12", "nodes": ["node1", "node2"], "cause": "rank died",
     "detail": "rank 1 on node2 died of signal 9 (SIGKILL)", "step": 31, "saved": 30, "next": "restart"}

requeued: how often Slurm had queued the job again. step: the last that metrics.jsonl has; saved: the newest
checkpoint's. Written by the supervisor of the job, one at a time, by `moe-dist submit` (submitted) and by `moe-dist
cancel` (cancel); each line is on the disk before what it tells of goes on. Light: no torch.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_dist.train.record.history import last_logged_step, last_saved_step

FILE = "history.jsonl"


def append(folder: Path, event: str, **details: Any) -> None:
    """A line of it, of now unless `time` is among the details."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"time": stamp(datetime.now(UTC)), "event": event} | details
    with (folder / FILE).open("a+b") as file:
        torn = file.tell() > 0 and _last_byte(file.fileno()) != b"\n"  # of one that was killed while it wrote
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def stamp(time: datetime) -> str:
    """As the lines have it."""
    return time.isoformat(timespec="milliseconds")


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; those that are torn are left out."""
    lines = []
    with suppress(FileNotFoundError):
        for text in (folder / FILE).read_bytes().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and "event" in line:
                    lines.append(line)
    return lines


def starts(lines: Sequence[dict[str, Any]]) -> int:
    """How often the run has been started."""
    return sum(line["event"] == "start" for line in lines)


def unfinished(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last start, if nobody has told its end."""
    told = [line for line in lines if line["event"] in ("start", "end")]
    return told[-1] if told and told[-1]["event"] == "start" else None


def is_cancelled(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether somebody asked to end the run since it was last started."""
    told = [line["event"] for line in lines if line["event"] in ("start", "cancel")]
    return told[-1:] == ["cancel"]


def fruitless(lines: Sequence[dict[str, Any]]) -> int:
    """Starts in a row, the last ones, that ended without a step or a checkpoint further than all before."""
    count, step, saved = 0, 0, 0
    for line in lines:
        if line["event"] == "end":
            count = 0 if line["step"] > step or line["saved"] > saved else count + 1
            step, saved = max(step, line["step"]), max(saved, line["saved"])
    return count


def job_of(lines: Sequence[dict[str, Any]]) -> str | None:
    """The job that had the run last, or was handed in for it."""
    return next((line["job"] for line in reversed(lines) if "job" in line), None)


def reached(folder: Path) -> dict[str, int]:
    """step and saved, as a line has them."""
    return {"step": last_logged_step(folder), "saved": last_saved_step(folder)}


def last_sign_of_life(folder: Path) -> datetime:
    """When the run last wrote what it writes at every step, or its history."""
    times = []
    for name in ("metrics.jsonl", "status.json", FILE):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return datetime.fromtimestamp(max(times), UTC)


def _last_byte(descriptor: int) -> bytes:
    return os.pread(descriptor, 1, os.fstat(descriptor).st_size - 1)
