"""Writes the pages of docs/reference/ that say what the sources say: python docs/write_reference.py [--check].

    configuration.md    the dataclasses of moe_dist/config, their types, defaults and docstrings
    commands.md         the table of commands in moe_dist/cli.py and their parsers
    exit-codes.md       moe_dist/train/exit_codes.py

errors.md beside them is written by hand. tests/unit/test_reference.py holds all four to the sources.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from moe_dist.cli import COMMANDS, parser_of
from moe_dist.config.describe import Key, keys_under, sections, yaml_words
from moe_dist.config.flags import Parser
from moe_dist.train import exit_codes

FOLDER = Path(__file__).parent / "reference"
_WRITTEN = "<!-- Written by docs/write_reference.py. Change what it is made of, then run that. -->"


def main(args: list[str]) -> int:
    """Writes what differs; with --check nothing is written, and 1 returned where something differs."""
    pages = {name: page for name, page in all_pages().items() if _read(FOLDER / name) != page}
    for name, page in pages.items():
        print(FOLDER / name)
        if "--check" not in args:
            (FOLDER / name).write_text(page, encoding="utf-8")
    return int(bool(pages) and "--check" in args)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def all_pages() -> dict[str, str]:
    """By file name."""
    made = {"configuration.md": configuration(), "commands.md": commands(), "exit-codes.md": codes()}
    return {name: "\n\n".join([*parts, _WRITTEN]) + "\n" for name, parts in made.items()}


def configuration() -> Iterator[str]:
    yield "# Configuration"
    yield (
        "Every key of a configuration file: its type, its default, and what it means. A key is a flag of the command "
        "line too: `model.moe.top_k: 1` of a file is `--model.moe.top-k 1`. `moe-dist config CONFIG` prints a whole "
        "configuration, and `moe-dist config CONFIG KEY` explains a key in it."
    )
    for path, about in sections().items():
        yield f"## `{path}`" if path else "## Top level"
        yield in_markdown(about)
        for key in keys_under(path, path):
            yield f"### `{key.path}`"
            yield f"`{key.types}` · default `{_default(key)}`"
            yield in_markdown(" ".join(key.text.split()))


def _default(key: Key) -> str:
    return '""' if key.default == "" else yaml_words(key.default)


def commands() -> Iterator[str]:
    yield "# Commands"
    yield (
        "`moe-dist COMMAND --help` prints the same. Commands that take a configuration take "
        "[its keys](configuration.md) as flags too."
    )
    for command in COMMANDS.values():
        yield from _command(parser_of(command), "##")


def _command(parser: Parser, level: str) -> Iterator[str]:
    """With the commands below it."""
    yield f"{level} `{parser.prog}`"
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield "```text\n" + "\n\n".join(filter(None, [_usage(parser), (parser.description or "").strip()])) + "\n```"
    shown = [action for action in parser._actions if action not in below and "--help" not in action.option_strings]
    rows = [_row(action, parser.help_of(action)) for action in shown if parser.help_of(action)]
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows])
    for action in below:
        for inner in action.choices.values():
            yield from _command(inner, level + "#")


def _usage(parser: Parser) -> str:
    if parser.usage:
        return parser.usage
    words = [parser.prog]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words.append(f"{{{','.join(action.choices)}}} ...")
        elif not action.option_strings:
            words.append(_name(action) + ("..." if action.nargs in ("+", "*") else ""))
        elif action.required:
            words.append(f"{action.option_strings[0]} {_name(action)}")
    flags = [action for action in parser._actions if action.option_strings and not action.required]
    return " ".join([*words, *(["[flags]"] if len(flags) > 1 else [])])


def _row(action: argparse.Action, text: str) -> str:
    names = ", ".join(action.option_strings) or _name(action)
    takes = "" if not action.option_strings or action.nargs == 0 else f" {_name(action)}"
    return f"| `{names}{takes}` | {in_markdown(text)} |"


def _name(action: argparse.Action) -> str:
    """Of what it takes; one that takes words of a list shows them."""
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}".replace("|", "\\|")
    return str(action.metavar or action.dest.upper()).replace("|", "\\|")


def codes() -> Iterator[str]:
    yield "# Exit codes"
    yield (
        "Of `moe-dist train`, and of the jobs that `moe-dist submit` hands in. torchrun returns 1 for all but 0, so "
        "the code of a run that failed is in its `status.json` too. Other commands return 0, 1 where what they check "
        "or do has failed, and 2 for a mistake of the user; their help says more."
    )
    rows = [f"| {code} | `{name}` | {in_markdown(text)} |" for name, code, text in _codes()]
    yield "\n".join(["| code | name | meaning |", "|---|---|---|", *rows])


def _codes() -> Iterator[tuple[str, int, str]]:
    """(name, code, docstring below it)."""
    body = ast.parse(Path(exit_codes.__file__).read_text(encoding="utf-8")).body
    for node, below in pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(node.targets[0], ast.Name)
            name = node.targets[0].id
            yield name, getattr(exit_codes, name), " ".join(str(below.value.value).split())


def in_markdown(text: str) -> str:
    """Plain text, in which `code` may be marked, as Markdown shows it."""
    parts = text.split("`")
    for at in range(0, len(parts), 2):
        for letter in "\\*<[]|":
            parts[at] = parts[at].replace(letter, f"\\{letter}")
    return "`".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
