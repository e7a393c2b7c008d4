"""The status of a run, status.json in its folder: what it does now, or how it ended. Light: no torch.

A process that is killed cannot write how it ended; that it has is seen by its lock, which the kernel dropped.

running | finished | preempted (saved, and left because a signal or the time limit asked for it) |
failed, with the reason and, where it has one, its code of exit_codes.py
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_dist.disk import is_locked, replace_text
from moe_dist.train.record.history import last_record

FILE, LOCK = "status.json", "run.lock"
STUDY = "study.json"
"""In a folder whose runs are the points of a study."""


def write_status(folder: Path, state: str, **details: Any) -> None:
    """Replace the status at once: a reader sees the old one or the new one. Two ranks may do so in the same moment."""
    replace_text(folder / FILE, json.dumps({"state": state, **details}, indent=1))


def read_status(folder: Path) -> dict[str, Any]:
    """The status on disk; state `none` where no run has started. Raises ValueError when it cannot be read."""
    try:
        status = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"state": "none"}
    except PermissionError:
        raise ValueError(f"{folder / FILE} cannot be read: no permission; ask its owner to make it readable") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / FILE} cannot be read: {error}; remove it, the checkpoints know the rest") from None
    if not isinstance(status, dict) or "state" not in status or not isinstance(status.get("step", 0), int):
        raise ValueError(f"{folder / FILE} names no state, or no step; remove it, the checkpoints know the rest")
    return status


def status_now(folder: Path) -> dict[str, Any]:
    """The status with what is known besides: the last step in metrics.jsonl and its loss, and `interrupted` for a run
    that is `running` on disk, but whose process is gone. A code of exit_codes.py stays last. Otherwise as
    `read_status`."""
    status = read_status(folder)
    if status["state"] not in ("running", "failed"):
        return status
    record = last_record(folder)
    known = {name: record[name] for name in ("step", "loss") if record.get(name) is not None}
    if status["state"] == "running" and is_locked(folder / LOCK) is False:
        reason = "its process is gone, without a word: killed, or its machine is; go on with --resume"
        return {"state": "interrupted", **known, "reason": reason}
    return {"state": status["state"]} | known | status


def describe_status(status: dict[str, Any]) -> str:
    """One line: the state first, then what is known of it, for example `preempted step=40 signal=SIGUSR2`."""
    details = (f"{key}={value:.4f}" if key == "loss" else f"{key}={value}" for key, value in status.items())
    return " ".join(details).removeprefix("state=").replace("\n", " ")


def folders_with(root: Path, *names: str) -> Iterator[Path]:
    """Those under `root` that hold a file with one of these names; what lies inside of them is not looked at."""
    for folder, inner, files in os.walk(root):
        if not set(names).isdisjoint(files):
            inner.clear()  # checkpoints, for example
            yield Path(folder)


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run has trained all of `steps` already."""
    status = read_status(folder)
    return status["state"] == "finished" and status.get("step", 0) >= steps
