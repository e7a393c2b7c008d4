"""How far the points of a study are, in words, and whether one may go on as it is. Light: no torch."""

from collections.abc import Mapping
from typing import Any

from moe_dist.disk import is_locked
from moe_dist.study.design.grid import Point
from moe_dist.study.ledger.ledger import loss_unit
from moe_dist.study.ledger.settings import other_settings
from moe_dist.study.run.whereabouts import lock_of
from moe_dist.train.record.status import describe_status, read_status


def summary(record: dict[str, Any]) -> str:
    """A line of the ledger in a few words."""
    if record["status"] != "finished":
        again = f" (attempt {record['attempt']})" if record.get("attempt", 1) > 1 else ""
        return f"{record['status']}{again}: {record['reason']}"
    words = [f"finished {record['steps']} steps in {record['seconds']:.0f} s"]
    if record["validation_loss"] is not None:
        words.append(f"validation {record['validation_loss']:.4f} {loss_unit(record)}")
    if record.get("validation_accuracy") is not None:
        words.append(f"accuracy {record['validation_accuracy']:.2%}")
    if record["drop_rate"] is not None:
        words.append(f"dropped {record['drop_rate']:.2%}")
    return ", ".join(words)


def state(point: Point, latest: Mapping[str, dict[str, Any]]) -> str:
    """How far a point is, in a line that opens with finished, trained, running, preempted, interrupted, failed or
    waiting. finished: the ledger says so."""
    record = latest.get(point.name)
    if record is not None and record["status"] == "finished":
        return summary(record)
    if not point.folder.exists():
        return "waiting"
    if is_locked(lock_of(point)):
        return "running"
    try:
        status = read_status(point.run)
    except ValueError as error:
        return f"failed: {error}"
    if status["state"] == "running":  # nobody holds its lock
        return "interrupted"
    if status["state"] == "preempted":
        return describe_status(status)
    if status["state"] == "finished" and record is None:  # its runner was killed, or the disk is full
        return "trained, but not in the ledger yet; study run writes it down"
    return summary(record) if record is not None else "waiting"


def refuse_other_settings(point: Point, record: Mapping[str, Any] | None) -> None:
    """Raises ValueError when the study has been changed since the point was started or finished. record: its last line
    in the ledger; None before any."""
    if changed := other_settings(point, record):
        told = "; ".join(f"{key} {what}" for key, what in changed.items())
        raise ValueError(
            f"{point.folder} was started with other settings ({told}): "
            "give the changed study another name, or remove that folder and its lines in the ledger"
        )
