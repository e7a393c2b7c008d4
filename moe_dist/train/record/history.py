"""The end of a run's metrics.jsonl, read backwards, however long the run has been. Light: no torch."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_dist.disk import lines_backwards


def last_record(run_dir: Path) -> dict[str, Any]:
    """The last record that metrics.jsonl has whole; empty where there is none."""
    for _, line in lines_backwards(run_dir / "metrics.jsonl"):
        with suppress(ValueError, KeyError, TypeError):  # a torn last line
            record = json.loads(line)
            return record | {"step": int(record["step"])}
    return {}


def last_logged_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl has whole; 0 for none."""
    step: int = last_record(run_dir).get("step", 0)
    return step


def last_saved_step(run_dir: Path) -> int:
    """That of the newest folder of a checkpoint, whole or not; 0 for none."""
    steps = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(step) for step in steps if step.isdigit()), default=0)


def recent_losses(run_dir: Path, count: int) -> list[float]:
    """Losses of the last `count` steps in metrics.jsonl that were applied."""
    losses: list[float] = []
    for _, line in lines_backwards(run_dir / "metrics.jsonl"):
        record = json.loads(line)
        if len(losses) == count:
            break
        if "skipped" not in record and record.get("loss") is not None:
            losses.append(record["loss"])
    return losses[::-1]
