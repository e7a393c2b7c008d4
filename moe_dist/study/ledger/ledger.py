"""The ledger of a study: ledger.jsonl, one line for each attempt at a point that has ended, finished or failed.

Lines are only ever appended, under a lock and forced onto the disk, so any number of runners may share it. A last line
without its end, torn by a power cut, is ignored by readers and removed by the next writer; where the disk is full, what
was written of a line is taken back. Any other line that cannot be read is named, and the rest is used: the point that
it was is recorded again from its run. Light: no torch.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from moe_dist.disk import flush, lines_backwards, locked
from moe_dist.study.ledger.lines import Lines

_SHOWN = 60  # characters of a line that cannot be read


class Ledger:
    """The lines of one file; each has the keys `point` and `status`. Reads what has come since it last did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = Lines(path)
        self._forget()

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and wait until it is on the disk. Costs the same however long the file is.

        Raises OSError, and leaves the file as it was, where there is no room."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with locked(self.path.with_suffix(".lock")):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                whole = self._whole(os.fstat(file).st_size)
                os.ftruncate(file, whole)
                try:
                    _write(file, line, whole)
                except OSError as error:
                    os.ftruncate(file, whole)
                    raise OSError(error.errno, error.strerror, str(self.path)) from None
            finally:
                os.close(file)
            if whole == 0:
                flush(self.path.parent)

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """(all lines that can be read, in order; a complaint for each other one: file, line, first characters)."""
        self._follow()
        return self._records, self._complaints

    def records(self) -> list[dict[str, Any]]:
        """All lines that can be read, in order."""
        return self.read()[0]

    def latest(self) -> dict[str, dict[str, Any]]:
        """The last line of each point."""
        self._follow()
        return dict(self._latest)

    def of(self, point: str) -> dict[str, Any] | None:
        """The last line of one point; None before any."""
        self._follow()
        return self._latest.get(point)

    def finished(self, point: str) -> bool:
        record = self.of(point)
        return record is not None and record["status"] == "finished"

    def attempts(self, point: str) -> int:
        """How often the point has ended."""
        self._follow()
        return self._ended[point]

    def _follow(self) -> None:
        another, lines = self._lines.all_new()
        if another:
            self._forget()
        for line in lines:
            self._count += 1
            try:
                record = json.loads(line, parse_constant=_no_number)
                point, _ = record["point"], record["status"]
                self._latest[point] = record
            except (ValueError, KeyError, TypeError):
                shown = line[:_SHOWN].decode(errors="backslashreplace")
                self._complaints.append(f"{self.path}, line {self._count} cannot be read, and is left out: {shown!r}")
            else:
                self._records.append(record)
                self._ended[point] += 1

    def _forget(self) -> None:
        self._count = 0
        self._records: list[dict[str, Any]] = []
        self._complaints: list[str] = []
        self._latest: dict[str, dict[str, Any]] = {}
        self._ended = Counter[str]()

    def _whole(self, size: int) -> int:
        """Where the last whole line of the `size` bytes ends."""
        for start, line in lines_backwards(self.path):
            return size if start + len(line) < size else start
        return 0


def loss_unit(record: dict[str, Any]) -> str:
    """Of a finished point's losses."""
    return "nats/text" if "validation_accuracy" in record else "nats/token"


def _no_number(name: str) -> float:
    """For NaN and Infinity, which no line of ours has."""
    raise ValueError(f"{name} is no measurement")


def _write(file: int, line: bytes, at: int) -> None:
    while line:
        written = os.pwrite(file, line, at)
        line, at = line[written:], at + written
    os.fsync(file)
