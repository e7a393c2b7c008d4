"""Where transfers are added up.

What an optimizer step exchanges is many calls of few kinds: calls of one collective, group, phase and purpose are one
line. A group of one rank exchanges nothing, and has no line.
"""

from dataclasses import dataclass, field, replace

from moe_dist.parallel.mesh import Axis, Layout
from moe_dist.plan.transfer import Collective, Phase, Transfer


@dataclass
class Ledger:
    """Of one rank."""

    layout: Layout
    rank: int
    lines: dict[tuple[Collective, tuple[int, ...], Phase, str], Transfer] = field(default_factory=dict)

    def add(self, collective: Collective, axis: Axis, phase: Phase, what: str, size: int, calls: int = 1) -> None:
        """size: bytes of all `calls` together."""
        ranks = self.layout.ranks(axis, self.rank)
        if len(ranks) == 1 or calls == 0:
            return
        key = (collective, ranks, phase, what)
        line = self.lines.get(key) or Transfer(collective, axis, ranks, phase, what, 0, 0)
        self.lines[key] = replace(line, calls=line.calls + calls, bytes=line.bytes + size)

    def add_lines(self, other: "Ledger", times: int) -> None:
        """All of another ledger's, so many times."""
        for line in other.lines.values():
            self.add(line.collective, line.axis, line.phase, line.what, times * line.bytes, times * line.calls)
