"""Runs that a scheduler starts again and again, and that get nowhere: restarts.json counts such starts.

A start has got somewhere when there is a new checkpoint, or when it logged a step that none before it had reached: a
run that is killed now and then goes on, one that dies at the same step each time does not.
"""

import json
from pathlib import Path

from moe_dist.disk import replace_text
from moe_dist.train.exit_codes import CRASH_LOOP, EndRun
from moe_dist.train.record.history import last_logged_step

FILE = "restarts.json"


def starts_from(folder: Path, checkpoint: int | None) -> tuple[int, int]:
    """(earlier starts in a row that got nowhere, the furthest step that any has logged). checkpoint: the step that the
    run continues from, None for none. To be called before metrics.jsonl is cut back to it. A file that cannot be read
    counts none."""
    logged = last_logged_step(folder)
    try:
        seen = json.loads((folder / FILE).read_text(encoding="utf-8"))
        same = seen["checkpoint"] == checkpoint and logged <= seen["furthest"]
        return (int(seen["starts"]), int(seen["furthest"])) if same else (0, logged)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, logged


def refuse_crash_loop(folder: Path, checkpoint: int | None, starts: int, max_restarts: int | None) -> None:
    """Raises EndRun when the run has been started again max_restarts times and got nowhere."""
    if max_restarts is not None and starts > max_restarts:
        where = "before its first checkpoint" if checkpoint is None else f"after the checkpoint of step {checkpoint}"
        raise EndRun(
            CRASH_LOOP,
            f"{starts} starts have ended {where} (guard.max_restarts={max_restarts}): see logs/ in {folder} for why; "
            f"then remove {FILE} there, or raise guard.max_restarts",
        )


def note_start(folder: Path, checkpoint: int | None, starts: int, furthest: int) -> None:
    """Rank 0 alone. starts: this one included."""
    replace_text(folder / FILE, json.dumps({"checkpoint": checkpoint, "starts": starts, "furthest": furthest}))
