"""The command line's side of the configuration: every key of the YAML is a flag, and its value is read as YAML.

    --model.moe.top-k 1                     a value; =1 says the same, and - and _ mean the same in names
    --model.moe.capacity-factor null        null, true and false as in YAML; None as well
    --model.moe.capacity-factor 1.0 null    several values are a list
    --data.paths a.txt b.txt                what is text is taken as it stands, but for null; or [a.txt, b.txt]
    --parallel.sequence-parallel            true; so are =true and true. =false and
    --run.no-tensorboard                    false
    --model.moe.capacity-schedule 0 2.0 100 1.0      pairs of a key and its value

A mistake is a ValueError of one line, in the words of a mistake in a file.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from moe_dist.config.parse import field_types, parse_dict
from moe_dist.config.read import read_value
from moe_dist.config.schema import Config

_SOURCE = "command line"


ASK_PARSER = "--\0"
"""In place of the words behind a command: asks for its parser. Nobody can type it."""


class ParserAsked(Exception):
    """The answer to ASK_PARSER, for who wants to know what a command takes: completion, the reference."""

    def __init__(self, parser: "Parser") -> None:
        super().__init__(parser.prog)
        self.parser = parser


DEVICE: dict[str, Any] = {
    "choices": ["cpu", "cuda"],
    "help": "where it computes (default: cuda where there is any)",
}
"""What `--device` is, of every command that takes it."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of a flag that takes a value, where its help does not."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = not action.option_strings or action.nargs == 0 or "default" in text
        return text if told or action.default in (None, []) else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """For flags of a command itself: argparse without abbreviations, whose mistakes are a ValueError of one line.

    takes_config: keys of the configuration are flags beside those of the parser (config/arguments.py).
    """

    takes_config = False

    def __init__(self, prog: str, about: str = "", **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=about,
            allow_abbrev=False,
            formatter_class=_Help,
            **options,
        )

    def help_of(self, action: argparse.Action) -> str:
        """What --help says of a flag or a word, with its default; empty where it is not to be shown."""
        return "" if action.help in (None, argparse.SUPPRESS) else self._get_formatter()._expand_help(action)

    def flags(self) -> str:
        """The flags with their help, as argparse lists them."""
        formatter = self._get_formatter()
        formatter.start_section("flags")
        formatter.add_arguments(self._actions)
        formatter.end_section()
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        """Raises ParserAsked for ASK_PARSER."""
        if args and args[0] == ASK_PARSER:
            raise ParserAsked(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{_SOURCE}: {message}; {self.prog} --help lists what there is")


def override_config(config: Config, args: Sequence[str], own: Sequence[str] = ()) -> Config:
    """`config` with the flags `args` on top. own: flags of the command, to name in a mistake."""
    types, values = field_types(Config), asdict(config)
    for flag, given in _flags(args):
        words, name = given, flag.removeprefix("--").replace("-", "_")
        on = _without_no(name)
        if name not in types and types.get(on) is bool and not given:
            name, words = on, ["false"]
        if name not in types and "." not in name:
            known = [*own, *(f"--{path.replace('_', '-')}" for path in types)]
            near = get_close_matches(flag, known, n=1)
            raise ValueError(f"{_SOURCE}: {flag}: unknown flag" + (f"; did you mean {near[0]}?" if near else ""))
        _put(values, name, _value(flag, words, types.get(name)))
    return parse_dict(values, _SOURCE)


def _flags(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next one."""
    found: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            flag, equals, value = arg.partition("=")
            found.append((flag, [value] if equals else []))
        elif not found:
            raise ValueError(f"{_SOURCE}: {arg!r} belongs to no flag; flags open with --, such as --train.steps 100")
        else:
            found[-1][1].append(arg)
    yield from found


def _without_no(name: str) -> str:
    """run.no_tensorboard -> run.tensorboard"""
    section, dot, last = name.rpartition(".")
    return section + dot + last.removeprefix("no_")


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{_SOURCE}: {path}: {name} is a value, not a section")
        values = inner
    values[last] = value


def _value(flag: str, words: list[str], hint: Any) -> Any:
    """What the words after a flag stand for; hint: the type of its field."""
    if hint is None:
        return words  # whatever they are, there is no such key, or it is a section
    kinds = _kinds(hint)
    if not words and bool in kinds:
        return True
    if not words and not any(get_origin(kind) is list for kind in kinds):
        raise ValueError(f"{_SOURCE}: {flag} needs a value: write {flag} VALUE")
    if any(get_origin(kind) is dict for kind in kinds) and len(words) > 1:
        if len(words) % 2:
            raise ValueError(f"{_SOURCE}: {flag} takes pairs of a key and its value, got {len(words)} words")
        return {key: _read(flag, word) for key, word in zip(words[::2], words[1::2], strict=True)}
    if str in kinds or any(get_origin(kind) is Literal for kind in kinds):
        read = [None if NoneType in kinds and word in ("null", "None") else word for word in words]
    elif list[str] in kinds:
        return _texts(flag, words)
    else:
        read = [_read(flag, word) for word in words]
    if len(read) > 1 and not any(get_origin(kind) is list for kind in kinds):
        raise ValueError(f"{_SOURCE}: {flag} takes one value, got {' '.join(words)}")
    return read[0] if len(read) == 1 else read


def _texts(flag: str, words: list[str]) -> list[str]:
    """Each as it stands; or one list in YAML. A file that is called [a] is ./[a]."""
    if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
        read = _read(flag, words[0])
        if isinstance(read, list) and all(isinstance(each, str) for each in read):
            return read
    return words


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _read(flag: str, word: str) -> Any:
    try:
        value = read_value(word)
    except ValueError as error:
        raise ValueError(f"{_SOURCE}: {flag}: {error}") from None
    return None if value == "None" else value
