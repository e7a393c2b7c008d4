"""Reads a run's configuration: a YAML file, then flags of the command line, both checked strictly.

Nothing is guessed. A key that does not exist, a value of the wrong type or a key given twice is refused, all problems
at once, each with the file, the key and the nearest right one. Rules that tie two fields together are in `validate.py`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moe_dist.config.schema import Config

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
# Where a value may be of several types, pydantic adds the one that failed to the place of the error.
_TYPE_TAG = re.compile(r"int|float|str|bool|\[key\]|(list|nullable|dict)\[.*\]")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: all defaults), changed by flags such as `--model.moe.top-k 1`.

    Raises ValueError naming every unknown key and wrong type. Flags that do not parse end the program, as flags do.
    """
    config = Config() if path is None else parse_dict(read_yaml(Path(path)), str(path))
    return override_config(config, overrides) if overrides else config


def override_config(
    config: Config, args: Sequence[str], prog: str | None = None, description: str | None = None
) -> Config:
    """`config` with command-line flags on top; `--help` lists every field with its docstring and present value."""
    overridden = tyro.cli(Config, default=config, args=list(args), prog=prog, description=description)
    return parse_dict(asdict(overridden), "command line")


def parse_dict(values: Mapping[str, Any], source: str) -> Config:
    """Checks plain nested mappings and builds a Config. `source` opens every line of the ValueError."""
    return parse_as(Config, values, source)


def parse_as(cls: type[Schema], values: Mapping[str, Any], source: str) -> Schema:
    """The same for any dataclass of the schema's kind."""
    try:
        # By way of JSON: pydantic's strict mode takes mappings for dataclasses there, and only there.
        return TypeAdapter(cls).validate_json(json.dumps(_without_empty_sections(values, cls), default=str))
    except ValidationError as error:
        problems = _explain_all(cls, error.errors(include_url=False))
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def dump_config(config: Config) -> str:
    """YAML with every field, in the order of the schema. Loading it gives an equal Config."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `1e-3` is a number, dates stay text, and a key may appear once."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.value in first_line:
                problem = f"key {key.value!r} appears twice, first on line {first_line[key.value]}; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first_line[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a dot before, and a sign after, the `e`, and reads 1e-3 as text. The dumper must then quote such text.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; empty when the file is. Every failure is a ValueError that opens with the path."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path}: {where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not sections such as `model:` and `train:`")
    return values


def _without_empty_sections(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Drops `section:` with nothing under it, which YAML reads as null: like an empty file, it means the defaults."""
    sections = _sections(cls)
    kept = {key: value for key, value in values.items() if not (key in sections and value is None)}
    return {
        key: _without_empty_sections(value, sections[key]) if key in sections and isinstance(value, dict) else value
        for key, value in kept.items()
    }


def _explain_all(cls: type, problems: Sequence[ErrorDetails]) -> list[str]:
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


def _explain(cls: type, path: str, problem: ErrorDetails) -> str:
    """One pydantic error, in the words of somebody who edits YAML."""
    if problem["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown key{_advice(cls, path)}"
    if problem["type"] == "missing":
        return f"{path}: missing; add `{path}: ...`"
    value = problem["input"]
    if problem["type"] == "literal_error":
        return f"{path}: {value!r} is not one of {problem['ctx']['expected'].replace(' or ', ', ')}"
    if expected := _EXPECTED.get(problem["type"]):
        hint = "; write null for none" if value in ("None", "none") else ""
        return f"{path}: {value!r} is not {expected}{hint}"
    return f"{path}: {value!r}: {problem['msg']}"


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
    for key in get_type_hints(cls):
        yield home, key
    for key, section in _sections(cls).items():
        yield from _keys(section, f"{home}.{key}".lstrip("."))


def _sections(cls: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    return {key: hint for key, hint in get_type_hints(cls).items() if isinstance(hint, type) and is_dataclass(hint)}
