"""Checks nested values against a dataclass, strictly, and says in one line each what is wrong; no command line."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_dist.config.schema import Config

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Schema = TypeVar("Schema")


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text; put it in quotes",
    "list_type": "a list",
    "dataclass_type": "a section (key: value lines)",
    "dict_type": "a mapping (key: value lines)",
    "int_parsing": "an integer",
}


_MOST_PROBLEMS = 50


_LONGEST_VALUE = 200


# Where a value may be of several types, pydantic adds the one that failed to the place of the error.
_TYPE_TAG = re.compile(r"int|float|str|bool|\[key\]|(list|nullable|dict)\[.*\]")


def parse_dict(values: Mapping[str, Any], source: str) -> Config:
    """Checks plain nested mappings and builds a Config. `source` opens every line of the ValueError."""
    return parse_as(Config, values, source)


def parse_as(cls: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """The same for any dataclass of the schema's kind."""
    from pydantic import ValidationError

    if unfit := list(_unfit(values)):
        raise ValueError("\n".join(f"{source}: {problem}" for problem in unfit))
    try:
        # By way of JSON: pydantic's strict mode takes mappings for dataclasses there, and only there.
        text = json.dumps(_without_empty_sections(values, cls), default=str)
        return _adapter(cls).validate_json(text)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = _explain_all(cls, found[:_MOST_PROBLEMS])
        if len(found) > _MOST_PROBLEMS:
            problems.append(f"and {len(found) - _MOST_PROBLEMS} more problems")
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def _unfit(values: Any, path: str = "") -> Iterator[str]:
    """A line for each integer that torch could not take, and each text that no file of a run could hold."""
    if isinstance(values, int) and not -(2**63) <= values < 2**64:
        yield f"{path}: {values} does not fit 64 bits"
    elif isinstance(values, str) and any("\ud800" <= letter <= "\udfff" for letter in values):
        names = "" if sys.getfilesystemencoding() == "utf-8" else ", or set PYTHONUTF8=1, as this locale is not UTF-8"
        yield f"{path}: {values!r} is not UTF-8 text; rename the file, or link to it under another name{names}"
    elif isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _unfit(value, f"{path}.{key}".lstrip("."))


def _without_empty_sections(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Drops `section:` with nothing under it, which YAML reads as null: like an empty file, it means the defaults."""
    sections = _sections(cls)
    kept = {key: value for key, value in values.items() if not (key in sections and value is None)}
    return {
        key: _without_empty_sections(value, sections[key]) if key in sections and isinstance(value, dict) else value
        for key, value in kept.items()
    }


@cache
def _adapter(cls: type[Schema]) -> "TypeAdapter[Schema]":
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _explain_all(cls: type, problems: Sequence["ErrorDetails"]) -> list[str]:
    """A line for each wrong value. Where several types are allowed, pydantic reports it once for each of them."""
    lines: dict[str, str] = {}
    for problem in problems:
        path = ".".join(str(part) for part in problem["loc"] if not _TYPE_TAG.fullmatch(str(part)))
        line, expected = _explain(cls, path, problem), _EXPECTED.get(problem["type"])
        if path in lines and expected is not None:
            wrong, hint, advice = lines[path].partition("; ")
            line = f"{wrong} or {expected}{hint}{advice}" if expected not in wrong else lines[path]
        lines[path] = line
    return [line for path, line in lines.items() if not any(other.startswith(f"{path}.") for other in lines)]


def _explain(cls: type, path: str, problem: "ErrorDetails") -> str:
    """One pydantic error, in the words of somebody who edits YAML."""
    if problem["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key{_advice(cls, path)}"
    if problem["type"] == "missing":
        return f"{path}: missing; add `{path}: ...`"
    value = repr(problem["input"])
    value = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
    if problem["type"] == "literal_error":
        return f"{path}: {value} is not one of {problem['ctx']['expected'].replace(' or ', ', ')}"
    if expected := _EXPECTED.get(problem["type"]):
        hint = "; write null for none" if problem["input"] in ("None", "none") else ""
        return f"{path}: {value} is not {expected}{hint}"
    if problem["type"] == "value_error":  # of a validator of ours
        return f"{path}: {value} {problem['ctx']['error']}"
    return f"{path}: {value}: {problem['msg']}"


def _advice(cls: type, path: str) -> str:
    """For an unknown key: the section that has it, or the nearest key of its own section, else of the others."""
    section, _, key = path.rpartition(".")
    known = sorted(_keys(cls), key=lambda item: item[0].count("."))  # of equal names, the outer one first
    homes = [home or "the top level" for home, name in known if name == key]
    if homes:
        return f"; {key} belongs under {' or '.join(homes)}"
    if near := get_close_matches(key, [name for home, name in known if home == section], n=1):
        return f"; did you mean {near[0]}?"
    if near := get_close_matches(key, [name for _, name in known], n=1):
        home = next(home for home, name in known if name == near[0])
        return f"; did you mean {home}.{near[0]}?" if home else f"; did you mean {near[0]}?"
    return f"; {section or 'the top level'} has {', '.join(name for home, name in known if home == section)}"


def _keys(cls: type, home: str = "") -> Iterator[tuple[str, str]]:
    """Every (section, key) below a dataclass of the schema."""
    for section, of in [(home, cls), *sections_of(cls, home)]:
        yield from ((section, key) for key in get_type_hints(of))


def sections_of(cls: type, home: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of every section below a dataclass of the schema: `model.moe` and its class."""
    for key, section in _sections(cls).items():
        path = f"{home}.{key}".lstrip(".")
        yield path, section
        yield from sections_of(section, path)


@cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The type of every key below a dataclass of the schema that is no section, by its dotted name."""
    homes = [("", cls), *sections_of(cls)]
    return {
        f"{home}.{key}".lstrip("."): hint
        for home, section in homes
        for key, hint in get_type_hints(section).items()
        if key not in _sections(section)
    }


@cache
def _sections(cls: type) -> Mapping[str, type]:
    """The fields of a dataclass that are dataclasses themselves, or null."""
    hints = {
        key: (hint, *get_args(hint)) if get_origin(hint) in (Union, UnionType) else (hint,)
        for key, hint in get_type_hints(cls).items()
    }
    found = {
        key: [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)] for key, kinds in hints.items()
    }
    return {key: kinds[0] for key, kinds in found.items() if kinds}
