"""How a run of real processes ends: by signals, a time limit, a rank that stands still, starts that lead nowhere."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from moe_dist.chaos.fault import Fault
from moe_dist.chaos.series import Series
from moe_dist.train.exit_codes import CRASH_LOOP, INTERRUPTED, SAVED, STALLED
from moe_dist.train.record.status import read_status
from tests.dist.programs import forked_ranks
from tests.faults.helpers import ended_alone, native, series

STALL = 8.0


def run_of(folder: Path, steps: int = 500, ranks: int = 2, **sections: Any) -> Series:
    sections["guard"] = {"stall_seconds": STALL} | sections.get("guard", {})
    return series(folder, steps, ranks, native(ranks), **sections)


@pytest.mark.slow
def test_signals_and_the_time_limit(tmp_path: Path) -> None:
    """Each heard by one rank only, from one and the same run; every start goes on where the last one left."""
    run, step = run_of(tmp_path), 0
    for kind, name in (("term", "SIGTERM"), ("int", "SIGINT"), ("usr2", "SIGUSR2")):
        step += 3
        start = run.start([Fault(kind=kind, rank=1, step=step, phase="update")])
        assert start.codes == [SAVED, SAVED] and start.first_step() == step - 2, start.said
        assert read_status(run.run) == {"state": "preempted", "step": step, "signal": name}
        assert (run.checkpoints / f"step-{step:06d}").exists()
    start = run.start([], "--resume", "--run.time-limit", "0.001")  # over before the first step: nothing new to save
    assert start.codes == [SAVED, SAVED], start.said
    assert read_status(run.run) == {"state": "preempted", "step": step, "signal": "time limit", "starts": 1}
    assert sorted(path.name for path in run.checkpoints.iterdir())[-1] == f"step-{step:06d}"


@pytest.mark.slow
def test_stopped_before_the_first_step_and_interrupted_twice(tmp_path: Path) -> None:
    run = run_of(tmp_path, ranks=1)
    start = run.start([], "--run.time-limit", "0.001")
    assert start.codes == [SAVED], start.said
    assert read_status(run.run) == {"state": "preempted", "step": 0, "signal": "time limit"}
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000000"]
    second = 1.5
    faults = [
        Fault(kind="int", rank=0, step=2, phase="data"),
        Fault(kind="int", rank=0, step=2, phase="data", later=second),
        Fault(kind="delay", rank=0, step=2, phase="data", seconds=60.0),  # of the step that would have to end first
    ]
    start = run.start(faults, "--resume", "--guard.stall-seconds", "100")
    assert start.codes == [INTERRUPTED], start.said
    assert start.ends[0].time - start.fired[-1][1]["time"] < 3
    assert read_status(run.run)["state"] == "failed" and "KeyboardInterrupt" in read_status(run.run)["reason"]


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path: Path, stopped: int) -> None:
    run = run_of(tmp_path)
    start = run.start([Fault(kind="stop", rank=stopped, step=7, phase="forward")])
    assert start.codes[1 - stopped] == STALLED and start.codes[stopped] == -9, start.said
    ended_alone(start)  # the others end it, for it cannot end by itself: nobody is left behind
    status = read_status(run.run)
    who = f"rank {stopped} ({socket.gethostname()}, pid "
    assert status["reason"].startswith(who) and status["code"] == STALLED
    assert f") has made no progress for {STALL:.0f} s, its process does not run; last: " in status["reason"]
    assert "of step 7" in status["reason"] and f"moe-dist: {status['reason']}" in start.said
    seconds = [end.time - start.fired[0][1]["time"] for end in start.ends]
    assert all(STALL <= each < STALL + 5 for each in seconds), seconds
    with forked_ranks():
        assert run.start([], "--resume", "--train.steps", "10").codes == [0, 0], run.starts[-1].said
    lines = [json.loads(line)["step"] for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 11)) and run.starts[-1].first_step() == 6


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    """Its process runs, its main thread does not go on. The rank that waits is not blamed."""
    run = run_of(tmp_path)
    start = run.start([Fault(kind="hang", rank=1, step=6, phase="data")])
    assert start.codes == [STALLED, STALLED], start.said
    ended_alone(start)
    reason = read_status(run.run)["reason"]
    assert reason.startswith("rank 1 (") and "its process runs; last: data of step 6, after all_" in reason
    assert "; rank 0 waits in all_" in reason
    assert all(end.time - start.fired[0][1]["time"] < STALL + 5 for end in start.ends)
    assert run.start([], "--resume", "--train.steps", "10").codes == [0, 0], run.starts[-1].said
    assert run.starts[-1].first_step() == 6


@pytest.mark.slow
def test_starts_that_lead_nowhere(tmp_path: Path) -> None:
    run = run_of(tmp_path, ranks=1, guard={"max_restarts": 1}, run={"save_every": 900})
    for _ in range(3):  # the first of them got as far as none before
        assert run.start([Fault(kind="kill", rank=0, step=2, phase="data")]).codes == [-9]
    start = run.start()
    assert start.codes == [CRASH_LOOP], start.said
    status = read_status(run.run)
    assert status["code"] == CRASH_LOOP and "2 starts have ended before its first checkpoint" in status["reason"]
    assert "restarts.json" in start.said
