"""Records of JSON lines and of CSV, each with the place that a person would look for it at."""

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moe_dist.config.values import user_path
from moe_dist.data.documents import UNREADABLE, open_lines

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    where: str
    """`file, line 7`: where it begins."""
    values: dict[str, Any]

    def label(self, key: str) -> str:
        """What stands at `key`, which data.label_key names; "true" and "false" too. Raises ValueError as `text`."""
        value = self.values.get(key)
        return str(value).lower() if isinstance(value, bool) else self.text(key, "label_key").strip()

    def text(self, key: str, field: str) -> str:
        """What stands at `key`, which data.`field` names. Raises ValueError for neither text nor a whole number."""
        try:
            return text_at(self.values, key, f"set data.{field}")
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


def text_at(values: Mapping[str, Any], key: str, way_out: str) -> str:
    """What stands at `key`. Raises ValueError for neither text nor a whole number, which true is not."""
    value = values.get(key)
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} at {key!r} is no text: {way_out}")
    if not isinstance(value, str | int):
        known = ", ".join(str(name) for name in values)
        raise ValueError(f"no text or whole number at {key!r}, but {known}: {way_out}")
    text = str(value)
    if _SURROGATE.search(text):
        raise ValueError(f"the text at {key!r} holds half of a surrogate pair: take it out")
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
            yield number, json_record(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def json_record(line: str | bytes) -> dict[str, Any]:
    """The object on a line. Raises ValueError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object: {line[:60]!r}")
    return record


def _csv(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, values, problem in csv_rows(file):
        if values is None:
            raise ValueError(f"{path}, line {line}: {problem}")
        yield line, values


def csv_rows(file: TextIO) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line where it begins, values by the names of the header, "") of each row; or (line, None, what is wrong there),
    after which the next line is read as a row. A header that names a column twice is the last."""
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
            way_out = "put a text with quotes into quotes, and double those in it"
            yield line, None, f"no CSV: {error}; {way_out}"
            continue
        if not fields:
            continue
        if names is None:
            names = fields
            if twice := sorted({name for name in names if names.count(name) > 1}):
                yield line, None, f"the header names {', '.join(twice)} twice"
                return
            continue
        if len(fields) != len(names):
            way_out = "put a text that holds a comma into quotes"
            yield line, None, f"{len(fields)} fields, but the header names {len(names)}: {way_out}"
            continue
        yield line, dict(zip(names, fields, strict=True)), ""


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The limit, 131,072 characters by default, is one of the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
