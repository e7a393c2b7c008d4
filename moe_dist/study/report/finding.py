"""What a check of a study has found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SHOWN = 4
"""How many points, or values, a line names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """check: its name. what: the rule that is broken, and how. points: whose. remedy: what to do."""

    level: Literal["violation", "warning"]
    check: str
    what: str
    points: tuple[str, ...]
    remedy: str

    @property
    def line(self) -> str:
        more = len(self.points) - SHOWN
        shown = ", ".join(self.points[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{self.check}: {self.what}{f' ({shown})' if shown else ''}; {self.remedy}"


def number_of(points: Sequence[str]) -> str:
    return f"{len(points)} point{'s' * (len(points) != 1)}"
