"""Runs the points of a study on this machine, `at_once` at a time, each as a process of its own.

A point that the ledger calls finished is never run again. An interrupted one continues from its newest checkpoint, or
anew when it has none (`train --resume auto`). A failed one is written down with the reason, and tried again when the
others are done, up to `retries` times; the next `study run` tries it again.

Several runners may work on one study: a lock on each point lets one of them train it. The training process inherits
the lock, so also the orphan of a runner that was killed keeps others away until it is done.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config.load import dump_config
from moe_dist.disk import lines_backwards, locked, replace_text
from moe_dist.study.design.grid import Point, Study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.ledger.measure import identity, measure, started
from moe_dist.study.run.live import Screen
from moe_dist.study.run.state import refuse_other_settings, summary
from moe_dist.study.run.wake import woken
from moe_dist.study.run.whereabouts import lock_of, remember
from moe_dist.study.shares import Share, environment, on_cores, shares, visible_gpus
from moe_dist.train.exit_codes import DONE, FAILED, SAVED
from moe_dist.train.record.status import FILE, describe_status, read_status

Command = Callable[[Path, int], list[str]]
"""(config file, ranks) -> the command that trains it, continuing what is there."""

_LOOK, _LOOK_FOR_OTHERS = 1.0, 0.2  # seconds between looks at the runs, and at locks that others hold
_TAIL = 20  # lines of a failed point's log


def train_command(config: Path, ranks: int) -> list[str]:
    train = ["-m", "moe_dist.cli", "train", str(config), "--resume", "auto"]
    if ranks == 1:
        return [sys.executable, *train]
    # torchrun would die of SIGUSR2 and leave its ranks alone; named here, it passes the signal on.
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"]
    torchrun = ["-m", "moe_dist.parallel.torchrun", "--nproc_per_node", str(ranks), *signals]
    return [sys.executable, *torchrun, *train]


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A point whose process runs. before: the run's status and its file's time when it started; log: where in train.log
    it begins; held: the point's lock."""

    point: Point
    share: Share
    process: subprocess.Popen[bytes]
    before: dict[str, Any]
    stamp: int
    log: int
    held: ExitStack
    began: float = field(default_factory=time.monotonic)


class Runner:
    """Runs points until done, or until Ctrl-C, SIGTERM, SIGHUP or SIGUSR2: then those at hand save and leave."""

    def __init__(self, study: Study, command: Command = train_command, at_once: int | None = None) -> None:
        """at_once: in place of the study's. Raises ValueError when it is below 1."""
        if at_once is not None and at_once < 1:
            raise ValueError(f"--at-once {at_once} is below 1; say how many points may run at a time")
        self.study, self.command = study, command
        self.at_once = study.file.at_once if at_once is None else at_once
        self.ledger = Ledger(study.ledger)
        self.stopped = False
        self.running: list[Attempt] = []
        self._signal: int = signal.SIGTERM  # that asks processes to save
        self._waiting: deque[Point] = deque()
        self._busy: dict[str, Point] = {}  # that another process held when their turn came
        self._failures = Counter[str]()  # of this start

    def run(self, points: Sequence[Point]) -> int:
        """Returns the exit code: 0 all finished, 1 some failed or a file cannot be written, 75 stopped by a signal.

        Raises ValueError when a point was started earlier with other settings, and for more at once than cores.
        """
        for point in points:
            refuse_other_settings(point, self.ledger.of(point.name))
        ranks, at_once = self.study.file.ranks, min(self.at_once, len(points))
        gpus = visible_gpus() if at_once > 1 else []
        self._free = shares(at_once, ranks, os.sched_getaffinity(0), gpus)
        self.at_once = at_once
        self._waiting.extend(points)
        remember(self.study)
        with woken(self._stop) as wait, Screen(self.study, self.ledger, points, at_once) as self.screen:
            try:
                self._work(wait)
            except OSError as error:  # a full disk
                self.screen.say(f"stopped: {error}; when that is mended, the same command goes on, and nothing is lost")
                return FAILED
            finally:
                self._leave()
        if self.stopped:
            return SAVED
        return self._verdict(points)

    def _work(self, wait: Callable[[float], None]) -> None:
        while self.running or (not self.stopped and (self._waiting or self._busy)):
            self._start_more()
            self.screen.show([attempt.point for attempt in self.running])
            if self.running or self._busy:
                wait(_LOOK_FOR_OTHERS if self._busy and self._free else _LOOK)
            for attempt in [each for each in self.running if each.process.poll() is not None]:
                self._end(attempt)

    def _start_more(self) -> None:
        while self._waiting and self._free and not self.stopped:
            point = self._waiting.popleft()
            if not self._begin(point):
                self._busy[point.name] = point
        for point in list(self._busy.values()) if not self._waiting else []:
            if self._free and not self.stopped:  # see how the other runner ends, or take over
                if self._begin(point):
                    del self._busy[point.name]
                else:
                    self.screen.say_once(self._line(point, "is being run by another process; waiting for it"))

    def _begin(self, point: Point) -> bool:
        """Start the point's process, unless it is over already; False when another process is at it."""
        if self.ledger.finished(point.name):
            return True
        with ExitStack() as held:
            lock = held.enter_context(locked(lock_of(point), wait=False))
            if lock is None:
                return False
            if self.ledger.finished(point.name):  # meanwhile
                return True
            if not (point.folder / "point.yaml").exists():
                replace_text(point.folder / "point.yaml", dump_config(point.config))
            try:
                before = read_status(point.run)
            except ValueError as error:
                self._fail(point, str(error))
                return True
            if before["state"] == "finished":  # trained, but its runner was killed before it could say so
                self._finish(point)
                return True
            self._say(point, "starts" if before["state"] == "none" else "goes on after: " + describe_status(before))
            share, stamp, log = self._free.pop(0), _stamp(point), _size(point.folder / "train.log")
            process = self._start(point, share, lock)
            self.running.append(
                Attempt(
                    point=point, share=share, process=process, before=before, stamp=stamp, log=log, held=held.pop_all()
                )
            )
        if self.stopped:  # the signal came before there was anybody to pass it on to
            process.send_signal(self._signal)
        return True

    def _start(self, point: Point, share: Share, lock: int) -> subprocess.Popen[bytes]:
        ranks = self.study.file.ranks
        with (point.folder / "train.log").open("ab") as log, on_cores(share.cores):
            # A process group of its own: Ctrl-C reaches the runner alone, which asks the process to save first.
            return subprocess.Popen(
                self.command(point.folder / "point.yaml", ranks),
                env=environment(share, self.at_once, ranks, os.environ),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                process_group=0,
            )

    def _end(self, attempt: Attempt) -> None:
        """The process has ended: write down how, and let go of the point."""
        self.running.remove(attempt)
        self._free.append(attempt.share)
        point, before = attempt.point, attempt.before
        with attempt.held:
            try:
                after = read_status(point.run)
            except ValueError as error:
                after = {"state": "failed", "reason": str(error)}
            if after["state"] == "finished":
                self._finish(point)
                if before["state"] == "none":
                    self.screen.took(point, time.monotonic() - attempt.began)
            elif self.stopped or (after["state"] == "preempted" and after != before):
                self._say(point, f"stopped: {describe_status(after)}; the same command continues it")
                if not self.stopped:  # somebody asked the process alone: they want the machine
                    self._stop(signal.SIGTERM)
            else:
                said = after["state"] == "failed" and _stamp(point) != attempt.stamp
                self._fail(point, after["reason"] if said else None, attempt)

    def _finish(self, point: Point) -> None:
        """The run has ended well: measure it."""
        try:
            record = measure(point)
        except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
            self._fail(point, f"trained, but cannot be measured: {type(error).__name__} {error}")
            return
        self._record(point, record)

    def _fail(self, point: Point, reason: str | None, attempt: Attempt | None = None) -> None:
        """reason: None where the run itself has given none."""
        tail = [] if attempt is None else log_tail(point.folder / "train.log", attempt.log)
        if reason is None and attempt is not None:
            code = attempt.process.returncode
            end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            said = next((line.strip() for line in reversed(tail) if line.strip()), "")
            log = point.folder / "train.log"
            reason = f"{end}; {log} ends with: {said}" if said else f"{end}; without a word in {log}"
        failure = {"status": "failed", "reason": " ".join(str(reason).split("\n")), "log_tail": tail}
        self._record(point, identity(point) | failure | {"run": str(point.run), "started": started(point)})
        self._failures[point.name] += 1
        if self._failures[point.name] <= self.study.file.retries:
            self._say(point, "will be tried again when the others are done")
            self._waiting.append(point)
        else:
            for line in tail:
                self.screen.say(f"    {line}")

    def _record(self, point: Point, record: dict[str, Any]) -> None:
        record |= {"attempt": self.ledger.attempts(point.name) + 1}
        self.ledger.append(record)
        self._say(point, summary(record))

    def _verdict(self, points: Sequence[Point]) -> int:
        left = [point.name for point in points if not self.ledger.finished(point.name)]
        if not left:
            return DONE
        if len(points) > 1:
            print(f"{len(points) - len(left)} of {len(points)} points have finished; failed: {', '.join(left)}")
        return FAILED

    def _stop(self, number: int) -> None:
        self.stopped = True
        self._signal = signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM
        for attempt in self.running:
            attempt.process.send_signal(self._signal)

    def _leave(self) -> None:
        """After an error: what still runs saves, if it can."""
        if self.running:
            self._stop(signal.SIGTERM)
        for attempt in self.running:
            attempt.process.wait()
            attempt.held.close()

    def _say(self, point: Point, text: str) -> None:
        self.screen.say(self._line(point, text))

    def _line(self, point: Point, text: str) -> str:
        return f"[{point.index + 1}/{len(self.study.points)}] {point.name}  {text}"


def log_tail(path: Path, start: int) -> list[str]:
    """The last lines of a log from its byte `start` on, at most 20, each cut at 300 characters."""
    lines: list[str] = []
    for at, line in lines_backwards(path):
        if at < start or len(lines) == _TAIL:
            break
        lines.insert(0, line.decode(errors="replace").rstrip()[:300])
    return lines


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stamp(point: Point) -> int:
    """By which a status that was written again is told from the one before, whatever it says."""
    status = point.run / FILE
    return status.stat().st_mtime_ns if status.exists() else 0
