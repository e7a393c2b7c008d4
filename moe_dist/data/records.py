"""Records of JSON lines and of CSV, each with the place that a person would look for it at."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moe_dist.config.values import user_path
from moe_dist.data.documents import UNREADABLE, open_lines


@dataclass(frozen=True)
class Record:
    where: str
    """`file, line 7`: where it begins."""
    values: dict[str, Any]

    def text(self, key: str, field: str) -> str:
        """What stands at `key`, which data.`field` names. Raises ValueError for neither text nor a whole number."""
        value = self.values.get(key)
        if value is None or isinstance(value, dict | list | float):
            known = ", ".join(str(name) for name in self.values)
            raise ValueError(f"{self.where}: no text or whole number at {key!r}, but {known}: set data.{field}")
        text = str(value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{self.where}: the text at {key!r} holds half of a surrogate pair: take it out")
        return text


def read_records(kind: str, paths: Sequence[str]) -> Iterator[Record]:
    """All records of the files, in order. kind: jsonl or csv. Raises ValueError naming file and line."""
    read = {"jsonl": _jsonl, "csv": _csv}[kind]
    for path in map(user_path, paths):
        try:
            with open_lines(path) as file:
                for line, values in read(path, file):
                    yield Record(f"{path}, line {line}", values)
        except (*UNREADABLE, UnicodeError) as error:
            raise ValueError(f"{path} in data.paths cannot be read: {error}") from error


def _jsonl(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object: {line[:60]!r}")
        yield number, record


def _csv(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, strict=True, skipinitialspace=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            with _fields_of_any_length():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: no CSV: {error}; put a text with quotes into quotes, and double those in it"
            ) from None
        if not fields:
            continue
        if names is None:
            names = fields
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{path}, line {line}: the header names {', '.join(twice)} twice")
            continue
        if len(fields) != len(names):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} fields, but the header names {len(names)}: "
                "put a text that holds a comma into quotes"
            )
        yield line, dict(zip(names, fields, strict=True))


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The limit, 131,072 characters by default, is one of the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
