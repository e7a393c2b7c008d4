"""The last collectives of each rank, when a run stands still: which one some ranks have entered and others have not.

Ranks of a group enter the same collectives in the same order, and each counts them (parallel/trail.py). So the twelfth
of a group is the same one on all its ranks, unless a rank has left one out: then what it entered in its place is
another one, or it has come less far than those that wait for it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_dist.disk import replace_text
from moe_dist.parallel.trail import Collective, Trail, ranks_told

LOG = "collectives.log"
_SAME_SIZE = frozenset({"all_reduce", "broadcast"})  # of which every rank hands in as much


@dataclass(frozen=True)
class Entered:
    """By one rank. count: notes of its Trail when this was written. last: the oldest first. numbers: how many of each
    group, all told."""

    count: int
    last: Sequence[Collective]
    numbers: Mapping[tuple[int, ...], int]


def write_entered(path: Path, trail: Trail) -> None:
    """To be called while the main thread stands still. Raises OSError."""
    told = {"count": trail.count, "last": tuple(trail.last), "numbers": tuple(trail.numbers.items())}
    replace_text(path, json.dumps(told))


def read_entered(path: Path) -> Entered | None:
    """None where it cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        told = json.loads(path.read_text(encoding="utf-8"))
        calls = [Collective(*values) for values in told["last"]]
        calls = [call._replace(ranks=tuple(call.ranks), shape=tuple(call.shape)) for call in calls]
        return Entered(told["count"], calls, {tuple(ranks): number for ranks, number in told["numbers"]})
    return None


def mismatch(entered: Mapping[int, Entered]) -> str | None:
    """One line on the collective that some ranks of a group have entered and others have not; None where all have
    entered the same. Of several the one that has been waited for longest. entered: by rank; of one that is missing
    nothing is known."""
    groups = dict.fromkeys(call.ranks for each in entered.values() for call in each.last)
    found = [told for group in groups if (told := _mismatch_of(group, entered)) is not None]
    return min(found)[1] if found else None


def describe(entered: Mapping[int, Entered]) -> str:
    """A paragraph for each rank."""
    now = time.time()
    return "\n".join(
        f"rank {rank}\n" + "".join(f"{now - call.at:10.1f} s ago  {_told(call)}\n" for call in each.last)
        for rank, each in sorted(entered.items())
    )


def _mismatch_of(group: tuple[int, ...], entered: Mapping[int, Entered]) -> tuple[float, str] | None:
    """(since when it has been waited for, the line), of the first one."""
    known = {rank: entered[rank] for rank in group if rank in entered}
    calls = {rank: {call.number: call for call in each.last if call.ranks == group} for rank, each in known.items()}
    for number in sorted({number for of_rank in calls.values() for number in of_rank}):
        here = {rank: of_rank[number] for rank, of_rank in calls.items() if number in of_rank}
        behind = [rank for rank, each in known.items() if each.numbers.get(group, 0) < number]
        kinds: dict[str, list[int]] = {}
        for rank, call in here.items():
            kinds.setdefault(_kind(call), []).append(rank)
        if behind or len(kinds) > 1:
            told = "; ".join(f"{_some(ranks)} entered {kind}" for kind, ranks in kinds.items())
            told += f"; {_some(behind)} did not" if behind else ""
            return min(call.at for call in here.values()), f"collective {number} of {ranks_told(group)}: {told}"
    return None


def _kind(call: Collective) -> str:
    shape = f" {list(call.shape)}" if call.what in _SAME_SIZE and call.shape else ""
    return f"{call.what}{shape} ({call.phase} of step {call.step})"


def _some(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:4]))
    return f"ranks {shown}" + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _told(call: Collective) -> str:
    size = f" of {list(call.shape)}, {call.bytes} bytes" if call.shape or call.bytes else ""
    where = f"{call.phase} of step {call.step}" if call.step else call.phase
    return f"{call.what} {call.number} of {ranks_told(call.ranks)}{size}; {where}"
