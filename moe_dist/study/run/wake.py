"""Waits for what happens first: a process of ours ends, a signal comes, or time is up."""

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@contextmanager
def woken(on_stop: Callable[[int], None]) -> Iterator[Callable[[float], None]]:
    """Yields wait(seconds). Within, requests to stop call `on_stop` with their number; a SIGHUP that is ignored, as
    under nohup, stays so. For the main thread: Python handles signals on no other."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wait(seconds: float) -> None:
        select.select([reader], [], [], seconds)
        with suppress(BlockingIOError):
            os.read(reader, 1 << 16)

    def stop(number: int, frame: FrameType | None) -> None:
        on_stop(number)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stops = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignored]
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop) for number in stops}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)  # the pipe hears it
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(reader)
        os.close(writer)
