"""Handing a script of slurm/ to sbatch. Every value is a word of its own on the way to a process: none is pasted into a
script, and no shell ever reads it.

What could still mean something else to sbatch is refused or attached: a value follows its option after `=`, so that one
that opens with `-` stays a value; control characters, newlines among them, are refused; `%`, which stands for a number
of the job in the names of its files, is doubled.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unicodedata import category

from moe_dist.parallel.slurm import ask


def repository(script: Path) -> Path:
    """The folder that holds `script`: MOE_DIST_ROOT, or the one that you are in. Raises ValueError for another."""
    root = Path(os.environ.get("MOE_DIST_ROOT") or ".").absolute()
    if not (root / script).is_file() or not (root / "launch/env.sh").is_file():
        raise ValueError(f"{root} is not the repository: submit from its root, or set MOE_DIST_ROOT")
    return root


def refuse_without_sbatch(instead: str) -> None:
    """instead: the command that does the same without Slurm."""
    if shutil.which("sbatch") is None:
        raise ValueError(f"no sbatch on the PATH: submit where Slurm is, or: {instead}")


def flags(options: Mapping[str, str | int | float | bool | None]) -> list[str]:
    """Options of sbatch by their long names; true is one without a value.

    >>> flags({"time": "1:00:00", "exclusive": True})
    ['--time=1:00:00', '--exclusive']
    """
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def refuse_control_characters(words: Iterable[str]) -> None:
    """Raises ValueError for a newline, say, that a table or a log would later take for the end of a line."""
    for word in words:
        if any(category(character) in ("Cc", "Zl", "Zp") for character in word):
            raise ValueError(f"command line: {word!r} holds a control character, such as a newline; leave it out")


def file_pattern(path: Path) -> str:
    """A path as sbatch takes it for `--output`: its own %, if any, doubled. Raises ValueError for one with a backslash,
    at which Slurm takes the whole file name as it stands, without the backslash and with the %j."""
    if "\\" in str(path):
        raise ValueError(f"{path} holds a backslash, which sbatch allows in no file name: choose another folder")
    return str(path).replace("%", "%%")


def hand_in(command: Sequence[str], root: Path, environ: Mapping[str, str] | None = None) -> str:
    """Runs `command`, an sbatch with --parsable, and returns the job's number. The job is told the repository, this
    interpreter, and `environ`. Raises ValueError with what sbatch says when it refuses, or hands in nothing."""
    environ = os.environ | {"MOE_DIST_ROOT": str(root)} | dict(environ or {})
    environ.setdefault("MOE_DIST_PYTHON", sys.executable)
    said = ask(*command, environ=environ).strip()
    number = said.partition(";")[0]  # NUMBER;CLUSTER where there are several
    if not (number.isascii() and number.isdigit()):  # after --help or --test-only, say
        said = " ".join(said.split())[:100] or "nothing"
        raise ValueError(f"sbatch names no job but says {said}: leave out what keeps it from handing one in")
    return number
