"""Reads one YAML file into plain mappings, lists and scalars, and takes nothing in it on trust.

No tag is followed, so nothing in a file can name a Python object; a file has a size, a depth and a number of values
once its aliases are written out, and each has a limit. `load.py` then checks what the values mean.

What a plain word means follows the core schema of YAML 1.2 (section 10.3.2), not the 1.1 of PyYAML:

    010        10, not 8                  off, on, yes, no    text, not true or false
    4:00:00    text, not base 60          1e-3                a number
    1_000      text, not a number         2024-01-01          text, not a date
    0b11       text, not a number         <<                  a merge key, as in 1.1
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_DIGITS = 100
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2; tags are refused, and a key may appear once."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = dict(yaml.SafeLoader.yaml_constructors)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._values = 0
        self._sizes: dict[int, int] = {}  # of finished nodes by id, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if not alias and event.tag is not None:
            _refuse(f"the tag {event.tag!r} is not supported; leave it out", event.start_mark)
        if self._depth == MAX_DEPTH:
            _refuse(f"more than {MAX_DEPTH} levels deep", event.start_mark)
        before = self._values
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias:
            if id(node) not in self._sizes:
                _refuse(f"the alias *{event.anchor} is inside of what it stands for", event.start_mark)
            self._values += self._sizes[id(node)]
        else:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        if self._values > MAX_VALUES:
            _refuse(f"more than {MAX_VALUES} values, with aliases written out", event.start_mark)
        return node

    def compose_scalar_node(self, anchor: str | None) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
            _refuse(f"a number of {len(node.value)} digits; at most {MAX_DIGITS} are read", node.start_mark)
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            _refuse("half of a surrogate pair is no text", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key must be plain text", key.start_mark)
            # As JSON will have it: 1, 0x1 and "1" are one key.
            name = key.value if key.tag == _MERGE else str(self.construct_object(key))
            if name in first_line:
                _refuse(f"key {name!r} appears twice, first on line {first_line[name]}; keep one", key.start_mark)
            first_line[name] = key.start_mark.line + 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes text that `read_yaml`, or a reader of YAML 1.1, would take for something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = dict(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # int("010", 0) is an error, int("010") is 10


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_INT, _integer)
_Loader.add_constructor(_FLOAT, _number)
_CORE = (
    (_MERGE, r"<<", "<"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
for _side in (_Loader, Dumper):
    for _tag, _pattern, _first in _CORE:
        _side.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; empty when the file is. Every failure is a ValueError that opens with the path."""
    try:
        values = yaml.load(_text(path), Loader=_Loader)  # a safe loader
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
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not sections such as `model:` and `train:`")
    return values


def read_value(text: str) -> Any:
    """One value as it would stand in a file, for example `1e-3`, `null` or `[1.0, null]`."""
    try:
        return yaml.load(text, Loader=_Loader)  # a safe loader
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{text[:100]!r} cannot be read: {problem}") from None


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes; is this a configuration?")
    return data.decode("utf-8")


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
