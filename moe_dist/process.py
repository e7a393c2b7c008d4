"""What may come to a process of ours from outside at any moment: signals, and readers that go away. Light: no torch."""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 1.0
"""A terminal's Ctrl-C reaches ranks at once, and again through torchrun: what follows within this time is no second
one."""
_INTERRUPTED = 128 + signal.SIGINT


class EarlySignals:
    """Within `with EarlySignals() as early:` requests to stop are noted, for whoever can act on them later.

    To be entered before anything large is imported: what a signal raises inside an import is caught by much of what is
    imported, and lost. A second Ctrl-C ends the process at once; nothing of it can be lost yet. Enter on the main
    thread: Python handles signals on no other.

    leave: end at the first signal already. speak: tell the person who watches that it was heard.
    """

    def __init__(self, leave: bool = False, speak: bool = True) -> None:
        self.heard = 0
        self._leave = leave
        self._speak = speak
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._leave:
            self._say(f"{name} before anything was started")
            os._exit(128 + number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted >= ECHO_SECONDS:
                self._say("interrupted")
                os._exit(_INTERRUPTED)
            self._interrupted = self._interrupted or now
        if not self.heard:
            self._say(f"{name}: leaving before the first step; Ctrl-C ends it at once")
        self.heard = number

    def _say(self, text: str) -> None:
        if self._speak:
            with suppress(OSError):
                os.write(2, f"moe-dist: {text}\n".encode())  # print is not for handlers of signals


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Around imports: a Ctrl-C raises KeyboardInterrupt when they are done, where nobody catches it."""
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


@contextmanager
def output_never_fatal() -> Iterator[None]:
    """Within, writing to standard output and error raises nothing: not when a pipe's reader has ended, nor when the
    disk behind them is full. Nor does Python's last flush afterwards."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would get its number, and what others print
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    # Python has none where the descriptor was closed.
    streams = [stream or open(os.devnull, "w", encoding="utf-8") for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = map(_Tolerant, streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            try:
                stream.flush()
            except OSError:
                _silence(stream)


class _Tolerant:
    """A text stream, but for the errors of writing to it. What cannot be written is lost, and the next is tried."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self._try(lambda: self._stream.writelines(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if error.errno == errno.EPIPE:  # for good
                _silence(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _silence(stream: TextIO) -> None:
    """What is still buffered, and what libraries write to the descriptor, goes nowhere."""
    with suppress(OSError, ValueError):  # no file of the system
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()
