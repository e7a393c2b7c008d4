"""A run under faults: start after start, what each did to it, and whether it ended as the fault should end it."""

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moe_dist.chaos.damage import DAMAGES, any_complete, corrupt, whole
from moe_dist.chaos.draw import Kind, Pace, draw, kinds
from moe_dist.chaos.fault import Fault
from moe_dist.chaos.series import Series, Start
from moe_dist.config import Config
from moe_dist.train.exit_codes import DONE, FAILED, REPLICAS_DIFFER, SAVED, STALLED, USAGE
from moe_dist.train.record.status import read_status

_DEADLINE = 300.0  # seconds of a start, in which any fault must have come and have done its work
_STALL, _MARGIN = 5.0, 5.0


@dataclass(frozen=True)
class Attack:
    """One start of the run, and what it came to. lost: steps trained that must be trained again. ready: seconds to its
    first step. came: whether all faults did. damaged: what was done to the newest checkpoint after it. problems: what
    did not go as it should."""

    kind: Kind | None
    faults: list[Fault]
    codes: list[int]
    trained: int
    lost: int
    ready: float | None
    came: bool
    damaged: str | None
    problems: list[str]


def under_watch(config: Config, ranks: int) -> tuple[Config, list[str]]:
    """`config` as a run under faults needs it, and what was changed, in words."""
    run, guard = config.run, config.guard
    copies = ranks > 1 and not (config.engine.name == "deepspeed" and config.engine.zero_stage == 3)
    run = replace(
        run,
        save_every=min(run.save_every, 10),
        keep_last=max(run.keep_last, 2),
        keep_every=None,
        keep_best=False,
        time_limit=None,
        sample_tokens=0,
        tensorboard=False,
    )
    guard = replace(guard, stall_seconds=_STALL, check_replicas=1 if copies else None, max_restarts=None)
    said = [
        f"{section}.{name}={value}"
        for section, new, old in (("run", run, config.run), ("guard", guard, config.guard))
        for name, value in asdict(new).items()
        if getattr(old, name) != value
    ]
    return replace(config, run=run, guard=guard), said


class Harassment:
    """Faults against the run of `series`. say: takes a line for the person who watches."""

    def __init__(self, series: Series, seed: int, say: Callable[[str], None]) -> None:
        self.series, self.seed, self.say = series, seed, say
        self.attacks: list[Attack] = []
        self._pace, self._had_one, self._gaps = Pace(), False, 0

    def run(self, minutes: float) -> int:
        """Faults until the time is over, or the run's steps; then a SIGTERM. The step that it has saved; 0 when
        nothing is left. Raises ValueError when the run does not start."""
        end = time.monotonic() + 60 * minutes
        config = self.series.config
        copies, every = config.guard.check_replicas is not None, config.run.save_every
        while time.monotonic() < end:
            begin = self._newest()
            if begin + self._pace.reach(every) + 2 * every > config.train.steps:
                self.say(f"the run comes to its last step, {config.train.steps}, before the time is over")
                break
            kind, by = kinds(self.seed, len(self.attacks), self.series.world, copies)
            good = whole(self.series.checkpoints)
            faults = draw(kind, by, config.run, self.series.world, good, self._pace)
            self._attack(kind, faults, begin, by)
        begin = self._newest()
        self._attack(None, [Fault(kind="term", rank=0, step=begin + 1, phase="data")], begin)
        return self._newest()

    def _newest(self) -> int:
        return max(whole(self.series.checkpoints), default=0)

    def _attack(self, kind: Kind | None, faults: list[Fault], begin: int, by: random.Random | None = None) -> None:
        """One start, from step `begin`, and the damage done after it."""
        self.say(f"start {len(self.series.starts) + 1}, from step {begin}: {'; '.join(map(str, faults))}")
        start = self.series.start(faults, seconds=_DEADLINE, watch=self._look)
        if USAGE in start.codes and start.first_step() is None and not self.attacks:  # later, something was lost
            raise ValueError(f"the run does not start: {start.said.strip()}")
        came = len(start.fired) == len(faults)
        problems = list(self._problems(start, begin)) if came else [f"the fault never came: codes {start.codes}"]
        good, damaged = whole(self.series.checkpoints), None
        if begin and max(good, default=0) < begin:
            problems.append(f"the newest whole checkpoint was of step {begin}, but now is of {max(good, default=0)}")
        if kind == "corrupt" and by is not None and len(good) > 1:
            damaged = corrupt(self.series.checkpoints / f"step-{good.pop():06d}", by.choice(DAMAGES), by)
        newest, trained = max(good, default=0), start.updates()
        lost = sum(step > newest for step in trained)
        ready = self._note_pace(start)
        self.attacks.append(Attack(kind, faults, start.codes, len(trained), lost, ready, came, damaged, problems))
        after = f"{lost} of {len(trained)} steps to train again, from step {newest}"
        self.say(f"  exit codes {start.codes}; {after}" + (f"; {damaged}" if damaged else ""))
        for problem in problems:
            self.say(f"  PROBLEM {problem}")

    def _note_pace(self, start: Start) -> float | None:
        """Seconds to the first step, where there was one."""
        begun = start.noted(0, "phase", phase="data")
        if not begun:
            return None
        ready = float(begun[0]["time"]) - start.began
        updates = [entry["time"] for entry in start.noted(0, "phase", phase="update")]
        if len(updates) > 5:
            self._pace = Pace(ready, (updates[-1] - updates[0]) / (len(updates) - 1))
        return ready

    def _look(self) -> None:
        there = any_complete(self.series.checkpoints)
        self._gaps += self._had_one and not there
        self._had_one |= there

    def _problems(self, start: Start, begin: int) -> Iterator[str]:
        """What is wrong with how a start went whose faults have all come."""
        fault, entry = start.fired[-1]
        first = start.first_step()
        if first is not None and first != begin + 1:
            yield f"began with step {first}, but the newest whole checkpoint was of step {begin}"
        if self._gaps:
            yield f"{self._gaps} times no whole checkpoint was there"
            self._gaps = 0
        for rank, (end, codes) in enumerate(zip(start.ends, expected_codes(fault, self.series.world), strict=True)):
            if end.killed and first is not None:
                yield f"rank {rank} was left behind, and had to be killed"
            elif not end.killed and end.code not in codes:
                yield f"rank {rank} ended with code {end.code}, not {' or '.join(map(str, codes))}"
        limit, took = _STALL + _MARGIN, max(end.time for end in start.ends) - entry["time"]
        if fault.kind in ("stop", "hang") and took > limit:
            yield f"the ranks needed {took:.1f} s to end, more than {limit:g}"
        status, named = read_status(self.series.run), f"rank {fault.rank} "
        words = {"stop": named, "hang": named, "flip": named, "fill": "File too large"}
        if (word := words.get(fault.kind)) and not (status["state"] == "failed" and word in status["reason"]):
            yield f"status.json says {status}, not `failed` for a reason with {word!r}"


def expected_codes(fault: Fault, world: int) -> list[Sequence[int]]:
    """How each rank may end after it."""
    others: Sequence[int] = {
        **{"kill": (FAILED, STALLED), "stop": (STALLED,), "hang": (STALLED,), "flip": (REPLICAS_DIFFER,)},
        **{"term": (SAVED,), "int": (SAVED,), "usr2": (SAVED,), "fill": (FAILED,)},
    }.get(fault.kind, (DONE,))
    own = (-signal.SIGKILL,) if fault.kind in ("kill", "stop") else others
    return [own if rank == fault.rank else others for rank in range(world)]


def leftovers(run: Path) -> list[str]:
    """Files in a run's folder that only a run under way should have."""
    found = [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix.startswith((".old", ".tmp"))]
    return sorted(str(path.relative_to(run)) for path in found)
