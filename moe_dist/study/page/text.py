"""How texts and values are shown, the same in HTML and in Markdown; and tables as CSV."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from moe_dist.study.page.model import Table, Value

Mark = Literal["plain", "code", "bold"]

NOTHING = "–"
"""Shown for a number that there is not."""

_MARKS = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_NUMBER = r"[+\-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][+\-]?\d+)?"
_MEASURE = re.compile(rf"({_NUMBER})(?: ?± ?{_NUMBER})?(?: ?[%A-Za-zµ][A-Za-z/]{{0,11}})?")


def spans(text: str) -> list[tuple[Mark, str]]:
    """The text in pieces, without its marks.

    >>> spans("use `a` **now**")
    [('plain', 'use '), ('code', 'a'), ('plain', ' '), ('bold', 'now')]
    """
    pieces: list[tuple[Mark, str]] = []
    end = 0
    for found in _MARKS.finditer(text):
        pieces.append(("plain", text[end : found.start()]))
        pieces.append(("code", found[1]) if found[1] is not None else ("bold", found[2]))
        end = found.end()
    pieces.append(("plain", text[end:]))
    return [(mark, piece) for mark, piece in pieces if piece]


def unmarked(text: str) -> str:
    return "".join(piece for _, piece in spans(text))


def shown(value: Value, form: str | None = None) -> str:
    """A value as a cell shows it; form: as format() takes it. Raises ValueError for a form that the number has not.

    >>> shown(0.123456), shown(0.123456, ".1%"), shown(12345), shown(None), shown("as it is", ".1%")
    ('0.1235', '12.3%', '12345', '–', 'as it is')
    """
    if value is None or _is_nan(value):
        return NOTHING
    if isinstance(value, str):
        return value
    if form is not None and math.isfinite(value):
        return format(value, form)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def shown_rows(
    columns: Sequence[str], rows: Sequence[Sequence[Value]], formats: Mapping[str, str]
) -> list[list[tuple[Value, str]]]:
    """(value, how it is shown) of every cell. Raises ValueError, which names the column, for a format that a value
    has not."""
    forms = [formats.get(column) for column in columns]
    found = []
    for row in rows:
        cells = []
        for column, value, form in zip(columns, row, forms, strict=True):
            try:
                cells.append((value, shown(value, form)))
            except ValueError as error:
                raise ValueError(f"column {column!r} cannot show {value!r} as {form!r}: {error}") from None
        found.append(cells)
    return found


def sort_key(value: Value) -> float | None:
    """What a cell is sorted by where it is a number, also one in words: `2.0 ± 0.1 ms`. None for text and for nothing.

    >>> sort_key("-1,250.5 ± 3 ms"), sort_key("2.13.0"), sort_key("top 2"), sort_key(None)
    (-1250.5, None, None, None)
    """
    if isinstance(value, str):
        found = _MEASURE.fullmatch(value.strip())
        return float(found[1].replace(",", "").replace("−", "-")) if found else None
    return None if value is None or _is_nan(value) else float(value)


def of_numbers(table: Table) -> list[bool]:
    """Of each column, whether it has a number, and nothing but numbers and places that are empty."""
    found = []
    for place in range(len(table.columns)):
        column = [row[place] for row in table.rows if row[place] is not None]
        found.append(bool(column) and all(sort_key(value) is not None or _is_nan(value) for value in column))
    return found


def csv_of(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    """Every digit that there is; nothing where there is nothing."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def _is_nan(value: Value) -> bool:
    return isinstance(value, float) and math.isnan(value)
