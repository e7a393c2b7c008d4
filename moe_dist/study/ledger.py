"""The ledger of a study: ledger.jsonl, one line for each point that has finished or failed.

Lines are only ever appended, under a lock and forced onto the disk, so any number of runners may share it. A line torn
by a power cut is ignored by readers and removed by the next writer.
"""

import json
import os
from pathlib import Path
from typing import Any

from moe_dist.disk import locked


class Ledger:
    """The lines of one file; each has the keys `point` and `status`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and wait until it is on the disk."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with locked(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1  # the end of the last whole line
            file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """(all lines that can be read, in order; a complaint for each other one: file, line, first characters)."""
        if not self.path.exists():
            return [], []
        records, complaints = [], []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                record["point"], record["status"]
                records.append(record)
            except (ValueError, KeyError, TypeError):
                complaints.append(f"{self.path}, line {number} cannot be read, and is left out: {line[:60]!r}")
        return records, complaints

    def records(self) -> list[dict[str, Any]]:
        """All lines that can be read, in order."""
        return self.read()[0]

    def latest(self) -> dict[str, dict[str, Any]]:
        """The last line of each point."""
        return {record["point"]: record for record in self.records()}

    def finished(self, point: str) -> bool:
        return self.latest().get(point, {}).get("status") == "finished"
