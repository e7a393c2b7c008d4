"""The pages of docs/reference say what the sources say, and so do CITATION.cff and the files of .github."""

import argparse
import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import moe_dist
from docs.write_reference import FOLDER, all_pages
from moe_dist.cli import COMMANDS, parser_of, usage
from moe_dist.config import Config
from moe_dist.config.flags import Parser
from moe_dist.config.parse import field_types, sections_of
from moe_dist.train import exit_codes

ROOT = Path(__file__).parents[2]


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ `(.+)`$", (FOLDER / page).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "exit-codes.md"])
def test_a_page_is_what_the_sources_make(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == all_pages()[name], "run python docs/write_reference.py"


def test_pages_have_every_key_command_and_code() -> None:
    keys = [*field_types(Config), *(section for section, _ in sections_of(Config))]
    assert sorted(headings("configuration.md")) == sorted(keys)
    commands = headings("commands.md")
    assert {name.split()[1] for name in commands} == set(COMMANDS)
    assert {"moe-dist checkpoint convert", "moe-dist data tokenizer train", "moe-dist study report"} < set(commands)
    codes = {value for name, value in vars(exit_codes).items() if name.isupper()}
    page = (FOLDER / "exit-codes.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == codes


def test_usage_has_every_command_and_every_command_below_one_a_line() -> None:
    assert re.findall(r"^  (\S+)", usage(), re.MULTILINE) == list(COMMANDS)
    for parser in every_parser():
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                told = {each.dest for each in action._get_subactions() if each.help}
                assert told == set(action.choices), f"{parser.prog}: no help, so no completion"


def every_parser() -> Iterator[Parser]:
    """Of each command, and of each below it."""
    waiting = [parser_of(command) for command in COMMANDS.values()]
    while waiting:
        parser = waiting.pop()
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()


def test_every_command_and_flag_says_what_it_is_for_and_every_value_what_it_is_by_default() -> None:
    """Flags that are hidden are those of `moe-dist train`, which status takes and does not need."""
    for parser in every_parser():
        assert (parser.description or "").strip(), f"{parser.prog}: what does it do?"
        for action in parser._actions:
            called = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
            if action.help == argparse.SUPPRESS and parser.prog == "moe-dist status":
                continue
            below = isinstance(action, argparse._SubParsersAction)
            text = parser.help_of(action)
            assert below or text, f"{called}: what is it for?"
            if action.option_strings and action.nargs != 0 and not action.required:
                assert "default" in text or "needed" in text, f"{called}: what without it?"


@cache
def messages() -> list[list[str]]:
    """Every text in our sources, cut where something is filled in."""
    found: set[str] = set()
    for path in (ROOT / "moe_dist").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.add("".join(map(str, parts)))
    return [text.strip().split("\0") for text in found]


def said(message: str) -> bool:
    """Whether some text of ours can read so, and is much of it."""
    return any(5 * sum(map(len, parts)) > 2 * len(message) and reads(parts, message) for parts in messages())


def reads(parts: list[str], message: str) -> bool:
    """Whether it is the parts, in order, with anything between them."""
    first, *rest = parts
    if not rest or not message.startswith(first):
        return message == first
    at = len(first)
    for part in rest[:-1]:
        found = message.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return message[at:].endswith(rest[-1])


def test_quoted_errors_are_still_said() -> None:
    quoted = headings("errors.md")
    assert len(quoted) > 40 and len(set(quoted)) == len(quoted)
    assert [message for message in quoted if not said(message)] == []


@pytest.mark.parametrize(
    "message",
    [
        "top_k=… is bigger than num_experts=…; lower …",
        "…=… does not divide the world size …; change parallel.… or the ranks",
        "no such message: do something about it",
    ],
)
def test_an_error_that_nobody_says_is_found(message: str) -> None:
    assert not said(message)


def test_the_citation_is_of_this_version() -> None:
    """The keys that the schema of CFF 1.2.0 asks for, and what pyproject.toml says too."""
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert told["cff-version"] == "1.2.0" and told["type"] == "software" and told["message"] and told["title"]
    assert told["version"] == project["version"] == moe_dist.__version__
    assert told["license"] == project["license"]
    assert [each["name"] for each in told["authors"]] == [each["name"] for each in project["authors"]]


def test_files_of_github_are_what_github_reads() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step["run"] for step in jobs["test"]["steps"] if "run" in step]
    assert commands == ["bash .ci/run"] and (ROOT / ".ci/run").is_file()
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
