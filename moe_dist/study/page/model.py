"""What a report's page holds, apart from how it looks: html.py and markdown.py show the same page.

| Part   | What it is                                                     | Beside the page      |
| ------ | -------------------------------------------------------------- | -------------------- |
| Figure | a drawing (theme.py's svg_of), and the numbers that it shows   | figures/NAME.svg, data/NAME.csv |
| Table  | numbers as they are; `formats` says how many digits are shown  | data/NAME.csv        |
| Prose  | paragraphs                                                     |                      |
| Notice | lines that must not be missed                                  |                      |

All texts are plain, with `code` in backticks and **bold**; everything else is shown as it is written.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float | None
"""Of a cell; None is a number that there is not."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """svg: inline, as theme.svg_of makes it. columns, rows: what is drawn. Raises ValueError for a name that makes no
    file name and for rows of another length than columns."""

    name: str
    title: str
    caption: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]

    def __post_init__(self) -> None:
        _check(self.name, self.columns, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """formats: column -> how its numbers are shown, as Python's format() takes it (".4f", ".1%", ",d"); text in such a
    column is shown as it is. Raises ValueError as Figure does, and for a format of no column."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    formats: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        _check(self.name, self.columns, self.rows)
        unknown = [column for column in self.formats if column not in self.columns]
        if unknown:
            raise ValueError(f"table {self.name} has formats for {unknown}; its columns are {list(self.columns)}")


@dataclass(frozen=True, slots=True)
class Prose:
    paragraphs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Notice:
    level: Literal["violation", "warning", "good"]
    lines: Sequence[str]


Part = Figure | Table | Prose | Notice


@dataclass(frozen=True, slots=True)
class Section:
    """exploratory: not a question that was stated before the runs; the page marks it."""

    title: str
    parts: Sequence[Part]
    exploratory: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """lead: stands first, violations before all else. again: commands that make the runs and the page once more.
    setting: what the numbers were measured with. Raises ValueError for two parts of one name."""

    title: str
    lead: Sequence[Notice | Prose]
    sections: Sequence[Section]
    again: Sequence[str] = ()
    setting: Table | None = None

    def __post_init__(self) -> None:
        names = [part.name for part in with_data(self)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"parts of one page share the names {twice}; each needs its own, of which files are named")


def with_data(page: Page) -> list[Figure | Table]:
    """Figures and tables in the order of the page; the setting last."""
    parts = [part for section in page.sections for part in section.parts]
    found = [part for part in parts if isinstance(part, Figure | Table)]
    return found + ([page.setting] if page.setting is not None else [])


def _check(name: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} names no file: small letters, digits, - and _, a letter or digit first")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"{name}: row {number} has {len(row)} values for {len(columns)} columns")
