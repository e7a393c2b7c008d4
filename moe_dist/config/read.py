"""Reads one YAML file into plain mappings, lists and scalars, and takes nothing in it on trust.

No tag is followed, so nothing in a file can name a Python object; a file has a size, a depth and a number of values
once its aliases are written out, and each has a limit. `load.py` then checks what the values mean.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_DIGITS = 100
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but `1e-3` is a number, dates stay text, tags are refused, and a key may appear once."""

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
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
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
    """Quotes text that `read_yaml` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a dot before, and a sign after, the `e`, and reads 1e-3 as text. The dumper must then quote such text.
for _side in (_Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


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
    except ValueError as error:  # a number that is none, such as 0b_
        raise ValueError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not sections such as `model:` and `train:`")
    return values


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes; is this a configuration?")
    return data.decode("utf-8")


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
