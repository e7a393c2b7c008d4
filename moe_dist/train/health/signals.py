"""Requests to stop: SIGTERM (preemption, `scancel`, `kill`), SIGUSR2 (a time limit that comes near), SIGINT (Ctrl-C),
and the time limit of the run itself.

A handler only notes the signal, for a step must not be torn. Ranks are signalled at different moments, some twice and
some not at all, so at each step boundary they agree on what the world has heard, and all stop after the same step.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group
from moe_dist.process import ECHO_SECONDS, STOP_SIGNALS, EarlySignals

TIME_LIMIT = "time limit"

_OUT_OF_TIME = 1  # below the numbers of all STOP_SIGNALS, so that a signal that came too is the one that is told


class StopGuard:
    """Within `with StopGuard() as guard:` the signals above are noted; afterwards the old handlers are back.

    Enter on the main thread: Python handles signals on no other. minutes: after which the run shall stop, from now.
    early: what was heard before. A second SIGINT, a second or more after the first, raises KeyboardInterrupt.
    """

    def __init__(self, minutes: float | None = None, early: EarlySignals | None = None) -> None:
        self._heard = 0
        self._early = early
        self._interrupted: float | None = None
        self._deadline = None if minutes is None else time.monotonic() + minutes * 60
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopGuard":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        if self._early is not None:  # now that it hears no more
            self._heard = self._heard or self._early.heard
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard = number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted >= ECHO_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now

    def agreed(self, world: Group, device: torch.device) -> str | None:
        """Name of a signal that some rank has heard, or TIME_LIMIT, the same on every rank; None when there is no
        reason to stop. All ranks call."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        heard = all_reduce(torch.tensor(self._heard or late * _OUT_OF_TIME, device=device), world, dist.ReduceOp.MAX)
        number = int(heard)
        if number == _OUT_OF_TIME:
            return TIME_LIMIT
        return signal.Signals(number).name if number else None
