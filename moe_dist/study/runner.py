"""Runs the points of a study, one after another, each as a process of its own.

A point that the ledger calls finished is never run again. An interrupted one continues from its newest checkpoint, or
anew when it has none (`train --resume auto`). A failed one is written down with the reason, and the others go on; the
next `study run` tries it again.

Several runners may work on one study: a lock on each point lets one of them train it. The training process inherits
the lock, so also the orphan of a runner that was killed keeps others away until it is done.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from moe_dist.config import Config
from moe_dist.config.load import dump_config, load_config
from moe_dist.disk import locked, replace_text
from moe_dist.parallel.slurm import leave_step
from moe_dist.study.grid import Point, Study
from moe_dist.study.ledger import Ledger
from moe_dist.study.measure import identity, loss_unit, measure, started
from moe_dist.train.record.status import describe_status, read_status

Command = Callable[[Path, int], list[str]]
"""(config file, ranks) -> the command that trains it, continuing what is there."""


def train_command(config: Path, ranks: int) -> list[str]:
    train = ["-m", "moe_dist.cli", "train", str(config), "--resume", "auto"]
    if ranks == 1:
        return [sys.executable, *train]
    # torchrun would die of SIGUSR2 and leave its ranks alone; named here, it passes the signal on.
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"]
    torchrun = ["-m", "moe_dist.parallel.torchrun", "--nproc_per_node", str(ranks), *signals]
    return [sys.executable, *torchrun, *train]


class Runner:
    """Runs points until done, or until Ctrl-C, SIGTERM, SIGHUP or SIGUSR2: then the point at hand saves and leaves."""

    def __init__(self, study: Study, command: Command = train_command) -> None:
        self.study, self.command = study, command
        self.ledger = Ledger(study.ledger)
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, points: Sequence[Point]) -> int:
        """Returns the exit code: 0 all finished, 1 some failed, 75 stopped by a signal.

        Raises ValueError when a point was started earlier with other settings.
        """
        for point in points:
            refuse_other_settings(point)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            busy = [point for point in points if not self._attempt(point, wait=False)]
            for point in busy:  # another runner has them: see how they end, or take over
                self._say(point, "is being run by another process; waiting for it")
                self._attempt(point, wait=True)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            return os.EX_TEMPFAIL
        latest = self.ledger.latest()
        return 0 if all(latest.get(point.name, {}).get("status") == "finished" for point in points) else 1

    def _attempt(self, point: Point, wait: bool) -> bool:
        """Bring one point to its end; True unless another process is at it."""
        if self.stopped or self.ledger.finished(point.name):
            return True
        with locked(lock_of(point), wait) as lock:
            if lock is None:
                return False
            if self.ledger.finished(point.name):  # meanwhile
                return True
            if not (point.folder / "point.yaml").exists():
                replace_text(point.folder / "point.yaml", dump_config(point.config))
            before = read_status(point.run)
            if before["state"] == "finished":  # trained, but its runner was killed before it could say so
                self._record(point, measure(point))
                return True
            self._say(point, "starts" if before["state"] == "none" else "goes on after: " + describe_status(before))
            code = self._train(point, lock)
            after = read_status(point.run)
            if after["state"] == "finished":
                self._record(point, measure(point))
            elif self.stopped or (after["state"] == "preempted" and after != before):
                self.stopped = True
                self._say(point, f"stopped: {describe_status(after)}; the same command continues it")
            else:
                said = after["state"] == "failed" and after != before
                reason = after["reason"] if said else self._last_words(point, code)
                failure = {"status": "failed", "reason": reason, "run": str(point.run), "started": started(point)}
                self._record(point, identity(point) | failure)
        return True

    def _train(self, point: Point, lock: int) -> int:
        command = self.command(point.folder / "point.yaml", self.study.file.ranks)
        with (point.folder / "train.log").open("ab") as log:
            # A process group of its own: Ctrl-C reaches the runner alone, which asks the process to save first.
            self._process = subprocess.Popen(
                command,
                env=leave_step(os.environ),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                process_group=0,
            )
            code = self._process.wait()
        self._process = None
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM)

    def _record(self, point: Point, record: dict[str, Any]) -> None:
        self.ledger.append(record)
        self._say(point, summary(record))

    def _say(self, point: Point, text: str) -> None:
        print(f"[{point.index + 1}/{len(self.study.points)}] {point.name}  {text}", flush=True)

    def _last_words(self, point: Point, code: int) -> str:
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = (point.folder / "train.log").read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{end}; {point.folder / 'train.log'} ends with: {said[:300]}"


def summary(record: dict[str, Any]) -> str:
    """A line of the ledger in a few words."""
    if record["status"] != "finished":
        return f"{record['status']}: {record['reason']}"
    words = [f"finished {record['steps']} steps in {record['seconds']:.0f} s"]
    if record["validation_loss"] is not None:
        words.append(f"validation {record['validation_loss']:.4f} {loss_unit(record)}")
    if record.get("validation_accuracy") is not None:
        words.append(f"accuracy {record['validation_accuracy']:.2%}")
    if record["drop_rate"] is not None:
        words.append(f"dropped {record['drop_rate']:.2%}")
    return ", ".join(words)


def state(point: Point, latest: dict[str, dict[str, Any]]) -> str:
    """How far a point is, in a line that opens with finished, running, preempted, interrupted, failed or waiting."""
    if latest.get(point.name, {}).get("status") == "finished":
        return summary(latest[point.name])
    if not point.folder.exists():
        return "waiting"
    with locked(lock_of(point), wait=False) as lock:
        if lock is None:
            return "running"
    status = read_status(point.run)
    if status["state"] == "running":  # nobody holds its lock
        return "interrupted"
    if status["state"] in ("preempted", "finished"):
        return describe_status(status)
    return summary(latest[point.name]) if point.name in latest else "waiting"


def refuse_other_settings(point: Point) -> None:
    """Raises ValueError when the point was started earlier, and the study has been changed since."""
    path = point.folder / "point.yaml"
    if not path.exists():
        return
    before, now = dict(_flat(load_config(path))), dict(_flat(point.config))
    changed = [f"{key} {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise ValueError(
            f"{point.folder} was started with other settings ({'; '.join(changed)}): "
            "give the changed study another name, or remove that folder and its lines in the ledger"
        )


def lock_of(point: Point) -> Path:
    return point.folder / "lock"


def _flat(config: Config) -> list[tuple[str, str]]:
    def walk(values: dict[str, Any], home: str) -> list[tuple[str, str]]:
        leaves = []
        for key, value in values.items():
            leaves += walk(value, f"{home}{key}.") if isinstance(value, dict) else [(home + key, json.dumps(value))]
        return leaves

    return walk(asdict(config), "")
