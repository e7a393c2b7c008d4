"""Files in blocks of about a MiB: what is handed to a worker at a time, and where work is taken up again.

Lines are cut from a file without being looked at; workers make records of them. CSV, Parquet and Arrow are read here,
since nobody can say in their middle where a row begins.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from moe_dist.data.documents import BLOCK, UNREADABLE, cut, open_text
from moe_dist.data.prepare.sources import Source
from moe_dist.data.records import csv_rows
from moe_dist.data.tokenizers import require

_ROWS = 64
_STEP = 1 << 13  # what an unpacker had read when it fails is lost, so it is asked for little at a time


@dataclass(frozen=True)
class Row:
    """line: its number in the file, from 1. problem: why there is no text."""

    line: int
    text: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Place:
    """What was read of a source: bytes of the unpacked text, or records; and lines or records."""

    at: int = 0
    line: int = 0


@dataclass(frozen=True)
class Block:
    """data: lines as bytes, a part of a text as bytes (documents.cut), or rows. first: number of its first line. place:
    behind it. read: how far in the file that is, in bytes as they lie there. ends: whether the last document in it
    does."""

    data: bytes | list[Row]
    first: int
    place: Place
    read: int
    ends: bool = True


class Unreadable(Exception):
    """The rest of a file, from a line on. problem: of which the message consists."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def read_blocks(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    """From `place` on. Raises Unreadable where the file gives no more, ValueError for what is no such file."""
    line = place.line
    try:
        reader = {"text": _text, "jsonl": _lines, "csv": _csv, "parquet": _parquet, "arrow": _arrow}[source.kind]
        for block in reader(source, place, text_key):
            yield block
            line = block.place.line
    except (*UNREADABLE, UnicodeError) as error:
        raise Unreadable(line + 1, f"cannot be read from here on: {error}") from None


def _text(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    with Path(source.path).open("rb") as file:
        stream = _Stream(open_text(file)[0])
        stream.skip(place.at)
        at, data = place.at, b""
        while True:
            data += stream.read(BLOCK + 1 - len(data))
            end = cut(data)
            at += end
            over = len(data) <= BLOCK
            yield Block(data[:end], 1, Place(at), file.tell(), over and not stream.failed)
            data = data[end:]
            if over:
                stream.read(1)  # where the file gives no more, that is raised here
                return


def _lines(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    with Path(source.path).open("rb") as file:
        stream = _Stream(open_text(file)[0])
        stream.skip(place.at)
        at, line = place.at, place.line
        while data := stream.read(BLOCK):
            if not data.endswith(b"\n"):
                data += stream.line()
            first, at, line = line + 1, at + len(data), line + data.count(b"\n")
            yield Block(data, first, Place(at, line), file.tell())


def _csv(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    with Path(source.path).open("rb") as file:
        stream, _ = open_text(file)
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        yield from _in_blocks(_csv_rows(source, text, text_key), place, file)


def _csv_rows(source: Source, text: TextIO, text_key: str) -> Iterator[Row]:
    for line, values, problem in csv_rows(text):
        if values is None:
            yield Row(line, problem=problem)
            continue
        _check_column(source, text_key, list(values))
        try:
            values[text_key].encode()
        except UnicodeEncodeError:
            yield Row(line, problem="not UTF-8")
        else:
            yield Row(line, values[text_key])


def _parquet(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    parquet = require("pyarrow.parquet", f"{source.path}, a Parquet file,")
    arrow = require("pyarrow", source.path)
    with Path(source.path).open("rb") as file:
        try:
            opened = parquet.ParquetFile(file)
            _check_column(source, text_key, opened.schema_arrow.names)
            groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
            first, before = 0, 0  # what lies in whole row groups before `place` is not read again
            while first < len(groups) and before + groups[first] <= place.at:
                first, before = first + 1, before + groups[first]
            left = list(range(first, len(groups)))
            batches = opened.iter_batches(batch_size=_ROWS, row_groups=left, columns=[text_key])
            yield from _in_blocks(_rows(batches, text_key, before), place, file, before)
        except arrow.ArrowException as error:
            raise OSError(error) from None


def _arrow(source: Source, place: Place, text_key: str) -> Iterator[Block]:
    arrow = require("pyarrow", f"{source.path}, an Arrow file,")
    with Path(source.path).open("rb") as file:
        try:
            opened = arrow.ipc.open_stream(file)
            _check_column(source, text_key, opened.schema.names)
            yield from _in_blocks(_rows(opened, text_key), place, file)
        except arrow.ArrowException as error:
            raise OSError(error) from None


def _rows(batches: Any, text_key: str, number: int = 0) -> Iterator[Row]:
    """number: of the row before them."""
    for batch in batches:
        for first in range(0, batch.num_rows, _ROWS):
            for value in batch.column(text_key).slice(first, _ROWS).to_pylist():
                number += 1
                yield Row(number, value)


def _in_blocks(rows: Iterator[Row], place: Place, file: IO[bytes], before: int = 0) -> Iterator[Block]:
    """Rows behind `place`, about a BLOCK at a time. before: how many come before the first of `rows`."""
    held: list[Row] = []
    size, number = 0, before
    for number, row in enumerate(rows, start=before + 1):
        if number <= place.at:
            continue
        held.append(row)
        size += len(row.text) if isinstance(row.text, str | bytes) else 0
        if size >= BLOCK or len(held) == BLOCK:
            yield Block(held, held[0].line, Place(number, row.line), file.tell())
            held, size = [], 0
    if held:
        yield Block(held, held[0].line, Place(number, held[-1].line), file.tell())


def _check_column(source: Source, text_key: str, names: list[str]) -> None:
    if text_key not in names:
        raise ValueError(f"{source.path} has no column {text_key!r}, but {', '.join(names)}: name one in --text-key")


class _Stream:
    """Bytes of a file. An error comes after what was read before it, and then with every call."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self._left = stream, b""
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer where there are no more."""
        parts = [self._left[:size]]
        self._left = self._left[size:]
        missing = size - len(parts[0])
        while missing > 0 and self._error is None:
            try:
                part = self._stream.read1(min(missing, _STEP))
            except (*UNREADABLE, UnicodeError) as error:
                self._error = error
                break
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        if self._error is not None and not data:
            raise self._error
        return data

    def line(self) -> bytes:
        """What is left of a line, its end included; nothing where there is no more."""
        parts = []
        while part := self._part():
            end = part.find(b"\n") + 1
            if end:
                parts.append(part[:end])
                self._left = part[end:] + self._left
                break
            parts.append(part)
        return b"".join(parts)

    def _part(self) -> bytes:
        try:
            return self.read(1 << 16)
        except (*UNREADABLE, UnicodeError):
            return b""  # the next `read` says it

    def skip(self, size: int) -> None:
        """What was unpacked before is unpacked again, and nothing kept."""
        while size > 0 and (part := self.read(min(size, BLOCK))):
            size -= len(part)
