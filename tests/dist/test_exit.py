"""How a run of real processes ends: by signals, a time limit, a rank that stands still, starts that lead nowhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.train.exit_codes import CRASH_LOOP, INTERRUPTED, SAVED, STALLED
from moe_dist.train.status import read_status
from tests.dist.helpers import TINY

ROOT = Path(__file__).parents[2]
STALL = 4.0


class Run:
    """A run folder, and the ranks that were started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.ranks = folder, folder / "runs" / "default", list[subprocess.Popen[bytes]]()
        self.log = folder / "log.txt"
        text = folder / "text.txt"
        text.write_text(" ".join(str(number * number) for number in range(1000)))
        values: dict[str, Any] = TINY | {
            "data": {"kind": "text", "paths": [str(text)]},
            "train": TINY["train"] | {"steps": 500, "threads": 1},
            "run": {
                **{"root": str(folder / "runs"), "save_every": 5, "log_every": 1, "eval_sequences": 2},
                "tensorboard": False,
            },
            "guard": {"stall_seconds": STALL},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(values))

    def start(self, *flags: str, steps: str = "0.1", world: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = [sys.executable, str(Path(__file__).with_name("faulty_train.py")), steps]
        where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.ranks = [
            subprocess.Popen(
                [*script, "train", str(self.folder / "run.yaml"), "--parallel.ep", str(world), *flags],
                env=os.environ | where | {"PYTHONPATH": str(ROOT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self.log.open("ab"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 180
        while self.steps() < step:
            assert time.monotonic() < end and all(rank.poll() is None for rank in self.ranks), self.said()
            time.sleep(0.05)

    def steps(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def ended(self, seconds: float = 180) -> list[int]:
        """Exit codes."""
        return [rank.wait(seconds) for rank in self.ranks]

    def said(self) -> str:
        return self.log.read_text()

    def status(self) -> dict[str, Any]:
        return read_status(self.path)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").glob("step-*"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    for rank in run.ranks:
        with suppress(ProcessLookupError):
            rank.kill()
        rank.wait()


@pytest.mark.slow
def test_signals_and_the_time_limit(run: Run) -> None:
    """Each heard by one rank only, from one and the same run; every start goes on where the last one left."""
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        run.start("--resume", "auto")
        run.wait_for_step(before + 2)
        run.ranks[1].send_signal(number)
        assert run.ended() == [SAVED, SAVED], run.said()
        status = run.status()
        assert (status["state"], status["signal"]) == ("preempted", number.name)
        assert status["step"] > before and run.checkpoints()[-1] == f"step-{status['step']:06d}"
        before = status["step"]
    run.start("--resume", "--run.time-limit", "0.001")  # over before the first step: nothing new to save
    assert run.ended() == [SAVED, SAVED], run.said()
    assert run.status() == {"state": "preempted", "step": before, "signal": "time limit", "starts": 1}
    assert run.checkpoints()[-1] == f"step-{before:06d}"


@pytest.mark.slow
def test_stopped_before_the_first_step_and_interrupted_twice(run: Run) -> None:
    run.start("--run.time-limit", "0.001", world=1)
    assert run.ended() == [SAVED], run.said()
    assert run.status() == {"state": "preempted", "step": 0, "signal": "time limit"}
    assert run.checkpoints() == ["step-000000"]
    run.start("--resume", world=1, steps="4")
    run.wait_for_step(1)  # four seconds are left until the next one
    run.ranks[0].send_signal(signal.SIGINT)
    time.sleep(1.2)
    began = time.monotonic()
    run.ranks[0].send_signal(signal.SIGINT)
    assert run.ended() == [INTERRUPTED] and time.monotonic() - began < 3, run.said()
    assert run.status()["state"] == "failed" and "KeyboardInterrupt" in run.status()["reason"]


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_others_end(run: Run, stopped: int) -> None:
    run.start()
    run.wait_for_step(7)
    process, other = run.ranks[stopped], run.ranks[1 - stopped]
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert other.wait(30) == STALLED
    seconds = time.monotonic() - began
    assert process.wait(5) == -signal.SIGKILL  # it cannot end by itself: nobody is left behind
    who = f"rank {stopped} ({socket.gethostname()}, pid {process.pid})"
    reason = run.status()["reason"]
    assert f"{who} has made no progress for 4 s, its process does not run; last: " in reason
    assert "of step " in reason and run.status()["code"] == STALLED
    assert f"moe-dist: {reason}" in run.said()
    assert STALL <= seconds < STALL + 5, seconds
    run.start("--resume", "--train.steps", "10", steps="0")
    assert run.ended() == [0, 0], run.said()
    lines = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 11))


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(run: Run) -> None:
    """Its process runs, its main thread does not go on. The rank that waits is not blamed."""
    run.start(steps="0,1,6")
    assert run.ended() == [STALLED, STALLED], run.said()
    reason = run.status()["reason"]
    assert reason.startswith("rank 1 (") and "its process runs; last: data of step 6, after all_" in reason
    assert "; rank 0 waits in all_" in reason


@pytest.mark.slow
def test_starts_that_lead_nowhere(run: Run) -> None:
    for start in range(3):
        run.start("--resume", "auto", "--guard.max-restarts", "1", "--run.save-every", "900", world=1)
        if start < 2:
            run.wait_for_step(1)
            run.ranks[0].kill()
            run.ended()
            (run.path / "metrics.jsonl").unlink()
    assert run.ended() == [CRASH_LOOP], run.said()
    status = run.status()
    assert status["code"] == CRASH_LOOP and "2 starts have ended before its first checkpoint" in status["reason"]
    assert "restarts.json" in run.said()
