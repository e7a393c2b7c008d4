"""Where the time of a step goes, and which rank was the slowest.

| part              | what                                                                                       |
|-------------------|--------------------------------------------------------------------------------------------|
| data              | reading this rank's sequences, and bringing them to the device                             |
| forward, backward | of the model, without the parts below; recomputation is backward's                         |
| experts           | of the experts that lie here, forward and backward                                         |
| optimizer         | clipping and the step                                                                      |
| other             | what is left of the step                                                                   |
| dispatch_wait     | until the rows of other ranks, and the counts of them, are here                            |
| gradient_exchange | gradients over the ranks that hold the same parameters                                     |
| other_wait        | until the others have done their part of all else: sums over tp, ZeRO's weights, the loss  |
| graph             | with engine.cuda_graph, forward and backward: what is in a graph is not told apart         |
| evaluation, save  | after the step                                                                             |
| between           | what is left until the next step: metrics.jsonl, signals, comparison of copies             |

A clock is read where the Trail says that one part ends and another begins, so each moment is in exactly one part: the
first ten add up to the step, all of them to the time from its beginning to that of the next. On CPU the clock is the
host's. On a GPU it is an event in the stream, so that a part is the time that it takes there; events are read when the
statistics of a later step have come back, which is known to be after them: nobody waits for them.

On one busy core of a CPU a reading takes 0.7 us, a layer's experts 55 us, forward and backward (two hooks of autograd):
a tenth of a percent of a step of 100 ms with two layers. Where nobody listens, nothing is read and nothing is hooked.

Ranks wait for each other, so their steps take equally long. The slowest is the one that spent most in parts of its own,
the first six. A rank hands them in, of a whole step, with the statistics of the next one; on a GPU of the one after.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

OWN = ("data", "forward", "experts", "backward", "optimizer", "other")
"""Parts in which no rank waits for another; handed in each step."""
IN_STEP = (*OWN, "dispatch_wait", "gradient_exchange", "other_wait", "graph")
PARTS = (*IN_STEP, "evaluation", "save", "between")

_PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "forward and backward": "graph",
    "gradients": "gradient_exchange",
    "statistics": "other",
    "update": "optimizer",
    "evaluation": "evaluation",
    "checkpoint": "save",
}
_WAITS = {"tp": "other_wait", "weights": "other_wait", "dp": "gradient_exchange", "edp": "gradient_exchange"}


def part_of(phase: str, inside: str) -> str:
    """Of what a Trail tells its listener."""
    part = _PHASES.get(phase, "between")
    if not inside or part not in IN_STEP or part == "gradient_exchange":
        return part
    if inside in ("data", "experts"):
        return inside
    return _WAITS.get(inside, "dispatch_wait") if part in ("forward", "backward") else "other_wait"


@dataclass(frozen=True)
class _Lap:
    """From the beginning of a step to that of the next. marks: (part, reading of the clock when it began); the last is
    the end."""

    step: int
    marks: list[tuple[str, Any]]

    def seconds(self, between: Callable[[Any, Any], float]) -> dict[str, float]:
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, at), (_, until) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += between(at, until)
        return spent


class StepClock:
    """Of one rank. Give `hear` to its Trail, and call `begin`, `handed_in` and `record` in each step, on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = on_gpu = device.type == "cuda"
        self._now: Callable[[], Any] = _event if on_gpu else time.perf_counter
        self._between: Callable[[Any, Any], float] = _between_events if on_gpu else lambda at, until: until - at
        self._laps: deque[_Lap] = deque(maxlen=2 if on_gpu else 1)  # of a full one, the first can be read
        self._known: dict[str, float] | None = None
        self._slowest = Counter[tuple[int, str]]()
        self._began = 0.0
        self.forget()

    def forget(self) -> None:
        """The run goes back: what comes until the next `begin` belongs to no step."""
        self._lap: _Lap | None = None
        self._laps.clear()

    def begin(self, step: int) -> None:
        """Step `step`, counted from 1, which ends the one before."""
        now = self._now()
        if self._lap is not None:
            self._lap.marks.append(("", now))
            self._laps.append(self._lap)
        self._lap, self._began = _Lap(step, [("data", now)]), time.perf_counter()

    def step_seconds(self) -> float:
        """Of the step that has ended just now, for the host. On CPU what its parts add up to."""
        if self._on_gpu:
            return time.perf_counter() - self._began
        assert self._lap is not None, "no step has begun"
        return float(self._lap.marks[-1][1] - self._lap.marks[0][1])

    def hear(self, phase: str, inside: str) -> None:
        """The listener of a Trail."""
        if self._lap is not None and (now := self._now()) is not None:
            self._lap.marks.append((part_of(phase, inside), now))

    def handed_in(self) -> list[float]:
        """Seconds of OWN, of the step that `record` will tell of; zeros where there is none yet."""
        ready = len(self._laps) == self._laps.maxlen
        self._known = self._laps[0].seconds(self._between) if ready else None
        return [0.0 if self._known is None else self._known[part] for part in OWN]

    def record(self, own_RP: Sequence[Sequence[float]]) -> dict[str, Any]:
        """`timing`, for metrics.jsonl: the step that it is of, seconds of this rank by part, and the slowest rank;
        nothing where no step is known yet. own_RP: what each rank has handed in."""
        if self._known is None:
            return {}
        told = {part: seconds for part, seconds in self._known.items() if seconds or part != "graph"}
        found = slowest(own_RP)
        if found:
            self._slowest[found["slowest"]["rank"], found["slowest"]["part"]] += 1
        return {"timing": {"step": self._laps[0].step, **told, **found}}

    def describe_slowest(self) -> str | None:
        """`rank 1 in 38 of 40 steps, most often in data`; None where no ranks were compared."""
        if not self._slowest:
            return None
        by_rank = Counter[int]()
        for (rank, _), steps in self._slowest.items():
            by_rank[rank] += steps
        rank, steps = by_rank.most_common(1)[0]
        part = max((steps, part) for (of, part), steps in self._slowest.items() if of == rank)[1]
        return f"rank {rank} in {steps} of {self._slowest.total()} steps, most often in {part}"


def slowest(own_RP: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The rank with most seconds of its own, the part in which it is furthest above the median of the ranks, its own
    seconds and their median; nothing of a rank that is alone."""
    if len(own_RP) < 2:
        return {}
    totals = [sum(own) for own in own_RP]
    rank = max(range(len(totals)), key=totals.__getitem__)
    above = [own - median(column) for own, column in zip(own_RP[rank], zip(*own_RP, strict=True), strict=True)]
    part = OWN[max(range(len(OWN)), key=above.__getitem__)]
    return {"slowest": {"rank": rank, "part": part, "own": totals[rank], "median_own": median(totals)}}


def _event() -> torch.cuda.Event | None:
    """In the current stream; none while it is recorded as a graph."""
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(at: torch.cuda.Event, until: torch.cuda.Event) -> float:
    return at.elapsed_time(until) / 1e3
