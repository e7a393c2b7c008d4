"""What the doctor has found: facts by section, what is broken, and what one should know. And how it asks: whom it asks
may hang, so that every question is put to a thread or a process of its own, and given up after some time.
"""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(slots=True)
class Findings:
    """facts: {section: {name: value}}. broken: a line each, with the way out; training cannot run as it is. notes:
    what may be in the way of some of it."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class NoAnswer(Exception):
    """Nothing came in time."""


def within(seconds: float, work: Callable[[], Value]) -> Value:
    """What `work` returns or raises. Raises NoAnswer when it takes longer: its thread is left to itself, as nobody can
    interrupt who waits for a file server that is gone."""
    got: list[Value] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            got.append(work())
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not got:
        raise NoAnswer(f"no answer in {seconds:g} s")
    return got[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a program that has ended."""

    code: int
    out: str
    error: str


def answer_of(command: list[str], seconds: float) -> Answer:
    """Raises NoAnswer when it takes longer, and kills all that it started; OSError when it cannot be started."""
    # Files, not pipes: a process that cannot be killed would keep them open, and their reader waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=error, start_new_session=True)
        try:
            code = started.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer in {seconds:g} s") from None
        finally:  # also after a Ctrl-C
            if started.poll() is None:
                with suppress(OSError):
                    os.killpg(started.pid, signal.SIGKILL)
        texts = []
        for file in (out, error):
            file.seek(0)
            texts.append(file.read().decode(errors="replace").strip())
    return Answer(code, *texts)


def said_by(command: list[str], seconds: float) -> str | None:
    """Its standard output; None when it is not there, fails, says nothing, or takes longer."""
    try:
        answer = answer_of(command, seconds)
    except (OSError, NoAnswer):
        return None
    return answer.out or None if answer.code == 0 else None
