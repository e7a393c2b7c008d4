"""Runs that a scheduler starts again and again, and that get nowhere: restarts.json counts starts from a checkpoint.

Only a checkpoint is progress, for steps after it are lost with the process.
"""

import json
from pathlib import Path

from moe_dist.train.exit_codes import CRASH_LOOP, EndRun
from moe_dist.train.status import replace_text

FILE = "restarts.json"


def starts_from(folder: Path, checkpoint: int | None) -> int:
    """Earlier starts from the checkpoint of this step (None: from nothing). A file that cannot be read counts none."""
    try:
        seen = json.loads((folder / FILE).read_text())
        return int(seen["starts"]) if seen["checkpoint"] == checkpoint else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def refuse_crash_loop(folder: Path, checkpoint: int | None, starts: int, max_restarts: int | None) -> None:
    """Raises EndRun when the run has been started again max_restarts times without a new checkpoint."""
    if max_restarts is not None and starts > max_restarts:
        where = "before its first checkpoint" if checkpoint is None else f"after the checkpoint of step {checkpoint}"
        raise EndRun(
            CRASH_LOOP,
            f"{starts} starts have ended {where} (guard.max_restarts={max_restarts}): see logs/ in {folder} for why; "
            f"then remove {FILE} there, or raise guard.max_restarts",
        )


def note_start(folder: Path, checkpoint: int | None, starts: int) -> None:
    """Rank 0 alone. starts: this one included."""
    replace_text(folder, FILE, json.dumps({"checkpoint": checkpoint, "starts": starts}))
