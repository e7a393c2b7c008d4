"""What can go wrong in a run, and when: as data, to be drawn, written down and told to a person.

A cue is one of: a phase of a step, as `Trail.enter` announces it; a change to the checkpoints' folder in the save of a
step, by its name; seconds after the process started.
"""

import signal
from dataclasses import dataclass, field
from typing import Literal

from moe_dist.config.model import STRICT

Kind = Literal["kill", "stop", "term", "int", "usr2", "hang", "delay", "fill", "flip", "nan", "spike"]
Phase = Literal["data", "forward", "backward", "update", "evaluation", "checkpoint"]

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr2": signal.SIGUSR2,
}
_NUMBERS: dict[str, Phase] = {"flip": "update", "nan": "forward", "spike": "forward"}
"""Kinds that change a number, and the phase at whose end they do."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """kill, stop, term, int and usr2: the rank sends itself that signal. hang: its thread sleeps for ever. delay: for
    `seconds`. fill: from here on no file of the rank can grow, as on a full disk. flip: one bit of a weight that other
    ranks have a copy of. nan, spike: its loss is not a number, or a thousand times too large.

    step, phase: the cue. save, change: or the first change of that name in the save of that step, just before it, for
    example `rename .step-000020`. after: or seconds since the start. later: seconds from the cue to the signal. again:
    each time the cue comes, else once.
    """

    __pydantic_config__ = STRICT

    kind: Kind
    rank: int
    step: int | None = None
    phase: Phase | None = None
    save: int | None = None
    change: str | None = None
    after: float | None = None
    later: float = 0.0
    seconds: float = 0.0
    again: bool = False

    def __post_init__(self) -> None:
        cues = [(self.step, self.phase), (self.save, self.change), (self.after, self.after)]
        given = [cue for cue in cues if cue != (None, None)]
        if len(given) != 1 or None in given[0]:
            raise ValueError(f"{self.kind} needs one cue, step and phase, save and change, or after: not {given}")
        if self.kind in _NUMBERS and self.phase != _NUMBERS[self.kind]:
            raise ValueError(f"{self.kind} comes in phase {_NUMBERS[self.kind]} of a step, not in {self.phase}")
        if (self.later or self.after is not None) and self.kind not in SIGNALS:
            raise ValueError(f"{self.kind} cannot come at a time: only {', '.join(SIGNALS)} can")

    def __str__(self) -> str:
        if self.after is not None:
            cue = f"{self.after:.2f} s after the start"
        elif self.step is not None:
            cue = f"at step {self.step}, in {self.phase}"
        else:
            cue = f"in the save of step {self.save}, before {self.change}"
        later = f", {self.later:.3f} s later" if self.later else ""
        seconds = f" for {self.seconds:g} s" if self.kind == "delay" else ""
        return f"{self.kind} rank {self.rank} {cue}{later}{seconds}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the ranks of one start are told. journal: the folder where each writes what it does. checkpoints: that of
    the run."""

    __pydantic_config__ = STRICT

    journal: str
    checkpoints: str
    faults: list[Fault] = field(default_factory=list)
