"""Text is UTF-8 in every locale: a walk over the sources for calls that would ask it; and what it cannot show."""

import ast
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.config.load import load_config
from moe_dist.train.record.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
PROCESSES = {"run", "Popen", "check_output", "check_call"}


def locale_calls(source: str) -> Iterator[str]:
    """Calls that turn bytes into text, or text into bytes, and name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        if (name := _asks_locale(node)) is not None:
            yield f"line {node.lineno}: {name}"


def _asks_locale(node: ast.Call) -> str | None:
    owner, name = _names(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "open" and owner != "os":
        place = 1 if owner in (None, "io") else 0  # Path.open has no path before its mode
        mode = node.args[place] if len(node.args) > place else keywords.get("mode", ast.Constant("r"))
        return None if isinstance(mode, ast.Constant) and "b" in mode.value else name
    if name == "fdopen":
        mode = node.args[1] if len(node.args) > 1 else ast.Constant("r")
        return None if isinstance(mode, ast.Constant) and "b" in mode.value else name
    if (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) < 2):
        return name
    if name in ("FileHandler", "TextIOWrapper"):
        return name
    if name in PROCESSES and {"text", "universal_newlines"} & keywords.keys():
        return name
    return None


def _names(function: ast.expr) -> tuple[str | None, str]:
    """("os", "open") of os.open, ("", "open") of anything().open, (None, "open") of open."""
    if isinstance(function, ast.Attribute):
        return function.value.id if isinstance(function.value, ast.Name) else "", function.attr
    return None, function.id if isinstance(function, ast.Name) else ""


def test_every_text_file_names_its_encoding() -> None:
    sources = [path for folder in ("moe_dist", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(sources) > 100
    found = [
        f"{path.relative_to(ROOT)}, {call}"
        for path in sources
        for call in locale_calls(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "asks",
    [
        "open('x')",
        "open('x', 'w')",
        "io.open('x', mode='a')",
        "path.open()",
        "path.open('r')",
        "(a / b).open(mode)",
        "(a / b).read_text()",
        "path.read_text(errors='replace')",
        "path.write_text(text)",
        "logging.FileHandler('x')",
        "os.fdopen(3, 'w')",
        "subprocess.run(command, text=True)",
    ],
)
def test_the_walk_sees(asks: str) -> None:
    assert len(list(locale_calls(asks))) == 1


@pytest.mark.parametrize(
    "knows",
    [
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "path.open('ab', buffering=0)",
        "path.open(mode='xb')",
        "os.open('x', os.O_RDONLY)",
        "path.read_text(encoding='utf-8')",
        "path.read_bytes()",
        "os.fdopen(3, 'wb')",
        "subprocess.run(command)",
        "subprocess.run(command, encoding='utf-8')",
    ],
)
def test_the_walk_passes(knows: str) -> None:
    assert list(locale_calls(knows)) == []


def test_a_terminal_that_lacks_a_character_shows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, screen in screens.items():
        monkeypatch.setattr(sys, name, screen)
    assert main(["caf\u00e9", "caf\udce9"]) == 2  # the second: a byte of the command line that is no UTF-8
    print("caf\u00e9 \u2026 caf\udce9")
    for screen in screens.values():
        screen.flush()
    said = {name: screen.buffer.getvalue() for name, screen in screens.items()}
    assert rb"unknown command 'caf\xe9'" in said["stderr"]
    assert said["stdout"] == rb"caf\xe9 \u2026 caf\udce9" + b"\n"


def test_files_are_utf_8_where_the_locale_is_not(tmp_path: Path) -> None:
    """A process of its own: the locale is read when Python starts."""
    work = "import sys, pathlib; from moe_dist.disk import replace_text\n"
    work += "assert sys.getfilesystemencoding() == 'ascii', 'the locale is UTF-8 all the same'\n"
    work += "replace_text(pathlib.Path(sys.argv[1]) / 'tokenizer.json', chr(0xe9))"
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", work, str(tmp_path)], env=os.environ | ascii_locale, check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == "\u00e9".encode()


def test_what_no_file_of_a_run_could_hold_is_refused_by_name() -> None:
    named = re.escape(r"data.paths.1: 'caf\udce9.txt' is not UTF-8 text; rename the file, or link to it")
    with pytest.raises(ValueError, match=named):
        load_config(None, ["--data.kind", "text", "--data.paths", "a.txt", "caf\udce9.txt"])


def test_a_log_takes_any_name(tmp_path: Path) -> None:
    log = RunFolder(tmp_path).rank_log(0)
    log.info("caf\udce9 \u00e9")
    assert "caf\\udce9 \u00e9" in (tmp_path / "logs" / "rank-00000.log").read_text(encoding="utf-8")
