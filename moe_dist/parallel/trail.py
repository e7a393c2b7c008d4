"""What a rank did last, for whoever finds it standing still.

One Trail is shared by all groups of a mesh: collectives note themselves, the loop and the engines say which step and
phase they are in. Only the watchdog's thread reads it, so nothing is locked.
"""

from collections.abc import Sequence


class Trail:
    """count: notes so far. Ranks run the same program, so the one that holds others up has fewer than they. ticks:
    signs of life besides, of work that takes long and is not the same on all ranks."""

    def __init__(self) -> None:
        self.count = 0
        self.ticks = 0
        self.step = 0
        self.phase = "start"
        self._collective = ""
        self._entered = False  # the collective belongs to this phase, not to one before

    def enter(self, phase: str, step: int | None = None) -> None:
        """A new phase; steps are counted from 1."""
        self.step = self.step if step is None else step
        self.phase, self._entered = phase, False
        self.count += 1

    def note(self, what: str, ranks: Sequence[int]) -> None:
        """A collective that is about to be entered."""
        self._collective, self._entered = f"{what} over ranks {ranks[0]} to {ranks[-1]}", True
        self.count += 1

    def tick(self) -> None:
        self.ticks += 1

    def describe(self) -> str:
        """For example `all_reduce over ranks 0 to 3, backward of step 12`, or `data of step 13, after all_reduce over
        ranks 0 to 3`."""
        where = f"{self.phase} of step {self.step}" if self.step else self.phase
        if not self._collective:
            return where
        return f"{self._collective}, {where}" if self._entered else f"{where}, after {self._collective}"
