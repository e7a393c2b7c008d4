"""What a rank did last, for whoever finds it standing still; and what it does now, for whoever takes the time of it.

One Trail is shared by all groups of a mesh: collectives note themselves, the loop and the engines say which step and
phase they are in, and experts and collectives say when they begin and end within a phase. Only the watchdog's thread
reads it, so nothing is locked.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

KEPT = 16  # collectives


class Collective(NamedTuple):
    """A collective that this rank has entered. number: the how many-th of its group, from 1; the same on all its ranks
    while they do the same. shape: of what this rank hands in. at: of time.time."""

    number: int
    what: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: int
    phase: str
    step: int
    at: float


class Trail:
    """count: notes so far. Ranks run the same program, so the one that holds others up has fewer than they. ticks:
    signs of life besides, of work that takes long and is not the same on all ranks. last: collectives, the oldest
    first; numbers: how many of each group. listener: is told (phase, inside)
    each time that one of them changes, by the thread that computes; inside: an axis of the mesh whose ranks are waited
    for, `experts` or `data`, or nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.ticks = 0
        self.step = 0
        self.phase = "start"
        self.listener: Callable[[str, str], None] | None = None
        self.last: deque[Collective] = deque(maxlen=KEPT)
        self.numbers: dict[tuple[int, ...], int] = {}
        self._inside = ""
        self._entered = False  # the last collective belongs to this phase, not to one before

    def enter(self, phase: str, step: int | None = None) -> None:
        """A new phase; steps are counted from 1."""
        self.step = self.step if step is None else step
        self.phase, self._entered = phase, False
        self.count += 1
        self.go_inside("")

    def note(self, what: str, ranks: Sequence[int], shape: Sequence[int] = (), size: int = 0) -> None:
        """A collective that is about to be entered. size: bytes."""
        ranks = tuple(ranks)
        number = self.numbers[ranks] = self.numbers.get(ranks, 0) + 1
        at = time.time()
        self.last.append(Collective(number, what, ranks, tuple(shape), size, self.phase, self.step, at))
        self._entered = True
        self.count += 1

    def tick(self) -> None:
        self.ticks += 1

    def go_inside(self, what: str) -> None:
        """From here on, until another call or phase. Nothing of it is kept for the watchdog."""
        self._inside = what
        if self.listener is not None:
            self.listener(self.phase, what)

    def inside(self, what: str) -> AbstractContextManager[None]:
        """Within, `what`; after it, what was before."""
        return _NOTHING if self.listener is None else _Inside(self, what, self._inside)

    def describe(self) -> str:
        """For example `all_reduce over ranks 0 to 3, backward of step 12`, or `data of step 13, after all_reduce over
        ranks 0 to 3`."""
        where = f"{self.phase} of step {self.step}" if self.step else self.phase
        if not self.last:
            return where
        last = self.last[-1]
        collective = f"{last.what} over {ranks_told(last.ranks)}"
        return f"{collective}, {where}" if self._entered else f"{where}, after {collective}"


class _Inside:
    """A class, as a generator would take longer than what it is around."""

    def __init__(self, trail: Trail, what: str, before: str) -> None:
        self.trail, self.what, self.before = trail, what, before

    def __enter__(self) -> None:
        self.trail.go_inside(self.what)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.trail.go_inside(self.before)


_NOTHING = nullcontext()


def ranks_told(ranks: Sequence[int]) -> str:
    """`ranks 0 to 3`, or `ranks 0, 2, 4, 6`; of many that are not consecutive, `ranks 0, 8 to 120`."""
    first, last = ranks[0], ranks[-1]
    if last - first == len(ranks) - 1:
        return f"ranks {first} to {last}"
    return f"ranks {', '.join(map(str, ranks))}" if len(ranks) <= 4 else f"ranks {first}, {ranks[1]} to {last}"
