"""The status of a run, status.json in its folder: what it does now, or how it ended. Light: no torch.

running | finished | preempted (saved, and left because a signal or the time limit asked for it) |
failed, with the reason and, where it has one, its code of exit_codes.py
"""

import json
import os
from pathlib import Path
from typing import Any

FILE, _DRAFT = "status.json", ".draft-"


def write_status(folder: Path, state: str, **details: Any) -> None:
    """Replace the status at once: a reader sees the old one or the new one. Two ranks may do so in the same moment."""
    replace_text(folder, FILE, json.dumps({"state": state, **details}, indent=1))


def replace_text(folder: Path, name: str, text: str) -> None:
    """The file `name` as a whole: what was there stays until then. Raises OSError, and leaves nothing behind."""
    draft = folder / f"{_DRAFT}{name}{_own()}"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down can leave an empty file
        os.replace(draft, folder / name)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def remove_drafts(folder: Path) -> None:
    """What another process left that was killed in `replace_text`. While nobody else writes there."""
    for draft in folder.glob(f"{_DRAFT}*"):
        if not draft.name.endswith(_own()):
            draft.unlink(missing_ok=True)


def _own() -> str:
    return f"-{os.uname().nodename}-{os.getpid()}"


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


def describe_status(status: dict[str, Any]) -> str:
    """One line: the state first, then what is known of it, for example `preempted step=40 signal=SIGUSR2`."""
    details = (f"{key}={value}" for key, value in status.items() if key != "state")
    return " ".join([str(status["state"]), *details]).replace("\n", " ")


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run has trained all of `steps` already."""
    status = read_status(folder)
    return status["state"] == "finished" and status.get("step", 0) >= steps
