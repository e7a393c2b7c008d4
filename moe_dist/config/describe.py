"""What is said of the configuration: its sections, and every key with its type, its value and what it means.

| who says it                     | with                             |
|---------------------------------|----------------------------------|
| `moe-dist train --help [TOPIC]` | describe_sections, describe_keys |
| `moe-dist config CONFIG KEY`    | explain                          |
| docs/reference/configuration.md | sections, keys                   |

The texts are the docstrings under the fields of the dataclasses.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moe_dist.config.parse import field_types, sections_of
from moe_dist.config.rules.parts import shown
from moe_dist.config.schema import Config

_WIDTH = 100
_WORDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true | false", NoneType: "null"}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the configuration by its dotted name; hint: the type of its field; text: the docstring under it."""

    path: str
    hint: Any
    default: Any
    text: str

    @property
    def types(self) -> str:
        return type_words(self.hint)

    @property
    def flag(self) -> str:
        return f"--{self.path.replace('_', '-')}"

    def value_in(self, config: Config) -> Any:
        value: Any = config
        for name in self.path.split("."):
            value = getattr(value, name)
        return value


@cache
def keys() -> dict[str, Key]:
    """Every key that is no section, in the order of the schema."""
    texts, defaults = dict(_texts()), asdict(Config())
    return {
        path: Key(path, hint, _at(defaults, path), texts.get(path, "")) for path, hint in field_types(Config).items()
    }


@cache
def sections() -> dict[str, str]:
    """Every section with the first line of its docstring; "" is the top level."""
    found = [("", Config), *sections_of(Config)]
    return {path: (cls.__doc__ or "").strip().splitlines()[0] for path, cls in found}


def describe_sections() -> str:
    """The sections, a line each; then how to ask for more."""
    named = {path: about for path, about in sections().items() if path}
    width = max(map(len, named))
    lines = [f"  {path:{width}}  {about}" for path, about in named.items()]
    return "\n".join(["Keys of the configuration are flags too; --help SECTION, KEY or all tells of them:", *lines])


def describe_keys(topic: str, config: Config) -> str:
    """The keys of a section, one key, or all, with their values in `config`. Raises ValueError for what is neither."""
    path = _normal(topic)
    chosen = list(keys().values()) if path == "all" else keys_under(path, f"--help {path}")
    return "\n\n".join([*(_entry(key, config) for key in chosen), *_sections_below(path)])


def explain(topic: str, config: Config) -> str:
    """A key with its type, default, value in `config` and meaning; or all keys of a section. Raises ValueError for
    what is neither, naming the nearest."""
    path = _normal(topic)
    chosen = keys_under(path, path)
    head = [f"{path}: {sections()[path]}"] if path in sections() else []
    return "\n\n".join([*head, *(_explained(key, config) for key in chosen), *_sections_below(path)])


def keys_under(path: str, asked: str) -> list[Key]:
    """Those of a section, or the one key. Raises ValueError that opens with `asked` for what is neither."""
    if path in sections():
        return [key for key in keys().values() if key.path.rpartition(".")[0] == path]
    if path in keys():
        return [keys()[path]]
    known = sorted([*(each for each in sections() if each), *keys()], key=len)
    near = [each for each in known if each.endswith(f".{path}")] or get_close_matches(path, known, n=3, cutoff=0.8)
    raise ValueError(f"{asked}: no such section or key" + (f"; did you mean {' or '.join(near[:3])}?" if near else ""))


def _normal(topic: str) -> str:
    return topic.replace("-", "_").strip("_")


def _at(values: dict[str, Any], path: str) -> Any:
    value: Any = values
    for name in path.split("."):
        value = value[name]
    return value


def _sections_below(path: str) -> list[str]:
    below = [each for each in sections() if each.startswith(f"{path}.")]
    return [f"Sections below it: {', '.join(below)}"] if below else []


def _entry(key: Key, config: Config) -> str:
    head = f"{key.flag}  {key.types}  ({shown(key.value_in(config))})"
    return "\n".join([head, *_wrapped(key.text)])


def _explained(key: Key, config: Config) -> str:
    value, choices = key.value_in(config), get_origin(key.hint) is Literal
    facts = {
        "values" if choices or key.hint is bool else "type": key.types,
        "default": yaml_words(key.default),
        "here": yaml_words(value) + (", the default" if value == key.default else ""),
        "flag": key.flag,
    }
    return "\n".join([key.path, *_wrapped(key.text), *(f"    {name:8} {each}" for name, each in facts.items())])


def yaml_words(value: Any) -> str:
    """A value on one line, as a file would have it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else shown(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")


def type_words(hint: Any) -> str:
    """A type in the words of YAML: `INTEGER | list of INTEGER | null`."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(type_words(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) is list:
        return f"list of {type_words(get_args(hint)[0])}".replace(" | null", " or null")
    if get_origin(hint) is dict:
        key, value = get_args(hint)
        return f"{type_words(key)}: {type_words(value)}".replace(" | ", " or ") + ", ..."
    return _WORDS[hint]


def _texts() -> Iterator[tuple[str, str]]:
    """(dotted key, docstring under the field) of the whole configuration."""
    for section, cls in [("", Config), *sections_of(Config)]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                name = field.target.id
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    yield f"{section}.{name}".lstrip("."), inspect.cleandoc(below.value.value)
