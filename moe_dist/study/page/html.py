"""The page as one HTML file that needs nothing else: no font, script, picture or icon comes from elsewhere, and its own
rules (Content-Security-Policy) forbid a browser to ask.

Colours follow the reader's choice of light or dark, and are light in print. Tables sort by a click on a head, or by its
key; the data of each figure and table is a link to a CSV that the page holds.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from moe_dist.study.page.model import Figure, Notice, Page, Part, Prose, Section, Table
from moe_dist.study.page.text import csv_of, of_numbers, shown_rows, sort_key, spans, unmarked
from moe_dist.study.page.theme import DARK, FONTS, LIGHT

_TAGS = {"plain": "", "code": "code", "bold": "strong"}
_LONG = 24
"""Characters of a row's name that need a wide column, or they would take three lines."""


def html(page: Page) -> str:
    """The whole file. Raises ValueError for a format that does not fit a value."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"marked": _marked, "unmarked": unmarked}
    template = environment.from_string(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.render(
        title=unmarked(page.title),
        heading=page.title,
        light=Markup(_variables(LIGHT)),
        dark=Markup(_variables(DARK)),
        fonts=Markup(FONTS),
        lead=[_part(part) for part in violations_first(page.lead)],
        sections=[_section(section, anchor) for section, anchor in zip(page.sections, _anchors(page), strict=True)],
        again="\n".join(page.again),
        setting=None if page.setting is None else _part(page.setting),
    )


def violations_first(lead: Any) -> list[Notice | Prose]:
    """The lead as it is, but for violations, which come before all else."""
    return sorted(lead, key=lambda part: not (isinstance(part, Notice) and part.level == "violation"))


def _section(section: Section, anchor: str) -> dict[str, Any]:
    return {
        "title": section.title,
        "anchor": anchor,
        "exploratory": section.exploratory,
        "parts": [_part(part) for part in section.parts],
    }


def _part(part: Part) -> dict[str, Any]:
    match part:
        case Prose():
            return {"kind": "prose", "paragraphs": part.paragraphs}
        case Notice():
            return {"kind": "notice", "level": part.level, "lines": part.lines}
        case Figure():
            return {
                "kind": "figure",
                "name": part.name,
                "title": part.title,
                "caption": part.caption,
                "svg": _described(part),
                "csv": _csv(part),
            }
        case Table():
            return {
                "kind": "table",
                "name": part.name,
                "title": part.title,
                "note": part.note,
                "csv": _csv(part),
                "rows": len(part.rows),
                **_cells(part),
            }


def _cells(table: Table) -> dict[str, Any]:
    """The heads and the cells: how each is shown, what it is sorted by, whether its column is one of numbers."""
    rows, numbers = shown_rows(table.columns, table.rows, table.formats), of_numbers(table)
    return {
        "long": any(len(row[0][1]) > _LONG for row in rows),
        "heads": list(zip(table.columns, numbers, strict=True)),
        "cells": [
            [
                (text, None if (key := sort_key(value)) is None else f"{key:.12g}".replace("inf", "Infinity"), number)
                for (value, text), number in zip(row, numbers, strict=True)
            ]
            for row in rows
        ],
    }


def _described(figure: Figure) -> Markup:
    """The drawing, with its title and caption for who cannot see it."""
    words = escape(f"{unmarked(figure.title)}. {unmarked(figure.caption)}".strip())
    return Markup(figure.svg.replace("<svg", f'<svg role="img" aria-label="{words}"', 1))


def _csv(part: Figure | Table) -> str:
    return "data:text/csv;charset=utf-8," + quote(csv_of(part.columns, part.rows), safe=",.-")


def _anchors(page: Page) -> list[str]:
    """A name for each section that stays while its title does."""
    found: list[str] = []
    for section in page.sections:
        name = re.sub(r"[^a-z0-9]+", "-", unmarked(section.title).lower()).strip("-") or "section"
        found.append(f"{name}-{found.count(name) + 1}" if name in found else name)
    return found


def _marked(text: str) -> Markup:
    pieces = []
    for mark, piece in spans(text):
        tag = _TAGS[mark]
        pieces.append(f"<{tag}>{escape(piece)}</{tag}>" if tag else str(escape(piece)))
    return Markup("".join(pieces))


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
