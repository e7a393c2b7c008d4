"""Where transfers are added up.

What an optimizer step exchanges is many calls of few kinds: calls of one collective, axis, phase and purpose are one
line. A group of one rank exchanges nothing, and has no line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from moe_dist.parallel.mesh import Axis, Layout
from moe_dist.plan.transfer import Collective, Phase, Transfer


@dataclass
class Ledger:
    """Of one rank."""

    layout: Layout
    rank: int
    _sums: dict[tuple[Collective, Axis, Phase, str], tuple[int, int]] = field(default_factory=dict)
    """(calls, bytes) of each line."""
    _groups: dict[Axis, tuple[int, ...]] = field(default_factory=dict)

    def ranks(self, axis: Axis) -> tuple[int, ...]:
        """Of this rank's group."""
        if axis not in self._groups:
            self._groups[axis] = self.layout.ranks(axis, self.rank)
        return self._groups[axis]

    def same_group(self, axis: Axis) -> Axis:
        """`axis`, or one that was asked for before and has the same group: a key that is quick to compare."""
        ranks = self.ranks(axis)
        return next(other for other, known in self._groups.items() if known == ranks)

    def add(self, collective: Collective, axis: Axis, phase: Phase, what: str, size: int, calls: int = 1) -> None:
        """size: bytes of all `calls` together."""
        if calls == 0 or len(self.ranks(axis)) == 1:
            return
        key = (collective, axis, phase, what)
        before = self._sums.get(key, (0, 0))
        self._sums[key] = (before[0] + calls, before[1] + size)

    def empty(self) -> "Ledger":
        """Another one of this rank."""
        return Ledger(self.layout, self.rank, _groups=self._groups)

    def add_lines(self, other: "Ledger", times: int) -> None:
        """All of another ledger's, so many times."""
        for (collective, axis, phase, what), (calls, size) in other._sums.items():
            self.add(collective, axis, phase, what, times * size, times * calls)

    def transfers(self) -> list[Transfer]:
        """A line each, in the order of their first calls."""
        return list(self._lines())

    def _lines(self) -> Iterator[Transfer]:
        for (collective, axis, phase, what), (calls, size) in self._sums.items():
            yield Transfer(collective, axis, self.ranks(axis), phase, what, calls, size)
