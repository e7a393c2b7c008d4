"""How axes and their values are called, in files, in names of points and in words.

| value of an axis | label                                                    |
|------------------|----------------------------------------------------------|
| one value        | itself                                                   |
| a section        | kind=routed+window=32: its keys with their values        |
| a list           | 1.0+null                                                 |
| no keys at all   | as_base                                                  |

Labels are letters, digits and '.', '_', '=', '+', '-'. Long ones are cut, and end with a digest of the whole value.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Scalar = bool | int | float | str | None
CAPACITY = "model.moe.capacity_factor"

_LONGEST_LABEL = 48


def axis_names(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest ending that no other key has: model.moe.top_k is `top_k`."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = {}
    for key in keys:
        parts = 1
        while sum(ending(other, parts) == ending(key, parts) for other in keys) > 1:
            parts += 1
        names[key] = ending(key, parts)
    return names


def in_words(axes: Mapping[str, Scalar], names: Mapping[str, str]) -> str:
    """The values of some axes. names: of `axis_names`."""
    return ", ".join(f"{names[key]} {show(value)}" for key, value in axes.items())


def show(value: Scalar) -> str:
    """A value as YAML spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def value_label(value: Any) -> Scalar:
    """What an axis' value is called; see above."""
    if not isinstance(value, list | dict):
        return value  # type: ignore[no-any-return]  # of a file: nothing else is left
    text = file_safe("+".join(_words(value)) or "as_base")
    if len(text) <= _LONGEST_LABEL:
        return text
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:7]
    return f"{text[: _LONGEST_LABEL - 8]}+{digest}"


def means(given: Any, value: Any) -> bool:
    """Whether `given`, in a rule or a question, is this value of an axis, or its label."""
    if isinstance(value, list | dict) and given == value_label(value):
        return True
    return bool(given == value) and isinstance(given, bool) == isinstance(value, bool)


def file_safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", text)


def _words(value: Any, home: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (
                _words(inner, f"{home}.{key}".lstrip("."))
                if isinstance(inner, dict)
                else [f"{home}.{key}".lstrip(".") + "=" + "_".join(_words(inner))]
            )
    elif isinstance(value, list):
        for inner in value:
            yield "_".join(_words(inner))
    else:
        yield show(value)
