"""The page as Markdown: the same parts in the same order; figures and data are files beside it."""

import re
from collections.abc import Sequence

from moe_dist.study.page.html import violations_first
from moe_dist.study.page.model import Figure, Notice, Page, Part, Prose, Table
from moe_dist.study.page.text import of_numbers, shown_rows, spans

LONGEST = 30
"""Rows of a table; what is beyond them is in its CSV alone."""

_LEVELS = {"violation": "Violation", "warning": "Warning", "good": "Holds"}
_SPECIAL = re.compile(r"([\\`*\[\]<>~|]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;))")  # _ within a word is itself


def markdown(page: Page) -> str:
    """The whole file. Raises ValueError for a format that does not fit a value."""
    blocks = [f"# {marked(page.title)}"]
    for first in violations_first(page.lead):
        blocks += _part(first)
    for section in page.sections:
        blocks.append(f"## {marked(section.title)}{' (exploratory)' if section.exploratory else ''}")
        if section.exploratory:
            blocks.append("*Not a question that was stated before the runs: it settles nothing.*")
        for part in section.parts:
            blocks += _part(part)
    if page.again:
        blocks += ["## Again", "\n".join(["```", *page.again, "```"])]
    if page.setting is not None:
        blocks += [f"## {marked(page.setting.title)}", *_table(page.setting)]
    return "\n\n".join(blocks) + "\n"


def marked(text: str) -> str:
    """Text with its own marks, in which nothing else has a meaning in Markdown. One line."""
    pieces = []
    for mark, piece in spans(" ".join(text.split())):
        if mark == "code":
            pieces.append(f"`{piece}`")
        else:
            plain = _SPECIAL.sub(r"\\\1", piece)
            pieces.append(f"**{plain}**" if mark == "bold" else plain)
    line = re.sub(r"^([#+=-]+)(?=\s|$)", r"\\\1", "".join(pieces))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _part(part: Part) -> list[str]:
    match part:
        case Prose():
            return [marked(paragraph) for paragraph in part.paragraphs]
        case Notice():
            return ["\n>\n".join(f"> {line}" for line in [f"**{_LEVELS[part.level]}**", *map(marked, part.lines)])]
        case Figure():
            return [
                f"### {marked(part.title)}",
                f"![{marked(part.title)}](figures/{part.name}.svg)",
                f"{marked(part.caption)} ([data](data/{part.name}.csv))".strip(),
            ]
        case Table():
            return [f"### {marked(part.title)}", *_table(part)]


def _table(table: Table) -> list[str]:
    rows = shown_rows(table.columns, table.rows[:LONGEST], table.formats)
    numbers = of_numbers(table)
    lines = [
        _line(table.columns),
        "|" + "|".join("---:" if number else "---" for number in numbers) + "|",
        *(_line([text for _, text in row]) for row in rows),
    ]
    left_out = len(table.rows) - len(rows)
    ends = f"{left_out:,} more rows are in [data/{table.name}.csv](data/{table.name}.csv)." if left_out else ""
    pointer = ends or f"[data](data/{table.name}.csv)"
    return ["\n".join(lines), f"{marked(table.note)} {pointer}".strip()]


def _line(cells: Sequence[str]) -> str:
    """A cell may hold code with a bar in it, which ends a cell even there."""
    return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", marked(cell)) for cell in cells) + " |"
