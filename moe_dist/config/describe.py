"""What `--help` says of the configuration: its sections, and every key with its type, its value and what it means.

The texts are the docstrings under the fields of the dataclasses.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moe_dist.config.parse import field_types, sections_of
from moe_dist.config.rules.parts import shown
from moe_dist.config.schema import Config

_WIDTH = 100
_WORDS: dict[Any, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true | false", NoneType: "null"}


def describe_sections() -> str:
    """The sections, a line each; then how to ask for more."""
    sections = dict(sections_of(Config))
    width = max(map(len, sections))
    lines = [f"  {path:{width}}  {(cls.__doc__ or '').strip().splitlines()[0]}" for path, cls in sections.items()]
    return "\n".join(["Keys of the configuration are flags too; --help SECTION, KEY or all tells of them:", *lines])


def describe_keys(topic: str, config: Config) -> str:
    """The keys of a section, one key, or all, with their values in `config`. Raises ValueError for what is neither."""
    topic, types = topic.replace("-", "_").strip("_"), field_types(Config)
    sections = {"": Config, **dict(sections_of(Config))}
    if topic == "all":
        chosen = list(types)
    elif topic in sections:
        chosen = [path for path in types if path.rpartition(".")[0] == topic]
    elif topic in types:
        chosen = [topic]
    else:
        known = sorted([*sections, *types], key=len)
        near = [path for path in known if path.endswith(f".{topic}")] or get_close_matches(topic, known, n=1)
        raise ValueError(f"--help {topic}: no such section or key" + (f"; did you mean {near[0]}?" if near else ""))
    values, texts = asdict(config), dict(_texts())
    below = [path for path in sections if path.startswith(f"{topic}.")]
    more = [f"Sections below it: {', '.join(below)}"] if below else []
    return "\n\n".join([*(_entry(path, types[path], values, texts.get(path, "")) for path in chosen), *more])


def _entry(path: str, hint: Any, values: dict[str, Any], text: str) -> str:
    value: Any = values
    for name in path.split("."):
        value = value[name]
    head = f"--{path.replace('_', '-')}  {type_words(hint)}  ({shown(value)})"
    return "\n".join([head, *textwrap.wrap(text, _WIDTH, initial_indent="    ", subsequent_indent="    ")])


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
