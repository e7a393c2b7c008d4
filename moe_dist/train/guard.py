"""Requests to stop: SIGUSR2 (a time limit that comes near) and SIGTERM (preemption, `scancel`, `kill`).

A handler only notes the signal, for a step must not be torn. Ranks are signalled at different moments, some twice and
some not at all, so at each step boundary they agree on what the world has heard, and all stop after the same step.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group

EX_TEMPFAIL = 75
"""Exit code of a run that saved and left because a signal asked it to (sysexits.h: try again later)."""

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopGuard:
    """Within `with StopGuard() as guard:` the signals above are noted; afterwards the old handlers are back.

    Enter on the main thread: Python handles signals on no other.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopGuard":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard = number

    def agreed(self, world: Group, device: torch.device) -> str | None:
        """Name of a signal that some rank has heard, the same on every rank; None when none has. All ranks call."""
        heard = all_reduce(torch.tensor(self._heard, device=device), world, dist.ReduceOp.MAX)
        number = int(heard)
        return signal.Signals(number).name if number else None
