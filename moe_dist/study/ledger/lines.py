"""The lines of a file that others append to, each read once: for whoever looks again and again. Light: no torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 26
_KEPT = 256  # bytes before the place that was read to, by which the file is known again


class Lines:
    """Follows one file. Its last line counts once it ends in a newline."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._at, self._before, self._inode = 0, b"", -1

    def new(self) -> tuple[bool, list[bytes]]:
        """(whether this is another file than before, so that all lines so far are void; the next lines, without their
        newlines, of at most 64 MiB). Costs one look at the file's size where nothing has come.

        Another file: replaced, cut off before the place that was read to, or with other bytes just before it.
        """
        try:
            seen = self.path.stat()
            if (seen.st_ino, seen.st_size, seen.st_mtime_ns) == self._seen:
                return False, []
            with self.path.open("rb") as file:
                another = self._at > 0 and not self._same(file)
                if another:
                    self._forget()
                file.seek(self._at)
                data = file.read(_BLOCK)
                lines = self._take(data)
        except FileNotFoundError:
            void = self._at > 0
            self._forget()
            return void, []
        self._seen = (seen.st_ino, seen.st_size, seen.st_mtime_ns) if len(data) < _BLOCK else None
        self._inode = seen.st_ino
        return another, lines

    def all_new(self) -> tuple[bool, Iterator[bytes]]:
        """As `new`, whatever has come."""
        another, lines = self.new()

        def rest() -> Iterator[bytes]:
            more = lines
            while more:
                yield from more
                _, more = self.new()

        return another, rest()

    def _take(self, data: bytes) -> list[bytes]:
        """data: from where the last whole line ended."""
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        self._before = (self._before + whole[-_KEPT:])[-_KEPT:]
        return whole.split(b"\n")[:-1]

    def _same(self, file: BinaryIO) -> bool:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._at:
            return False
        file.seek(self._at - len(self._before))
        return file.read(len(self._before)) == self._before

    def _forget(self) -> None:
        self._at, self._before, self._inode, self._seen = 0, b"", -1, None
