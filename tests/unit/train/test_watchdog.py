import os
from pathlib import Path

import pytest

from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.trail import Trail
from moe_dist.train.watchdog import Age, Beat, Watchdog, _born, _kill_if_here


def test_age_is_the_time_that_this_process_has_run() -> None:
    age = Age()
    assert [age.see(value, 0.5) for value in (1, 1, 1, 2, 2)] == [0, 0.5, 1.0, 0, 0.5]


def test_the_last_thing_done() -> None:
    trail = Trail()
    assert trail.describe() == "start"
    trail.enter("data", 12)
    trail.enter("backward")
    trail.note("all_reduce", (0, 1, 2, 3))
    assert trail.describe() == "all_reduce over ranks 0 to 3, backward of step 12" and trail.count == 3
    trail.enter("update")
    assert trail.describe() == "update of step 12"


def test_a_pid_used_again_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    me = {"rank": 0, "host": os.uname().nodename, "pid": os.getpid(), "number": 1, "count": 1, "doing": ""}
    _kill_if_here(Beat(**me, born="1"))  # type: ignore[arg-type]
    _kill_if_here(Beat(**me | {"host": "elsewhere"}, born=_born(os.getpid())))  # type: ignore[arg-type]
    assert killed == []
    _kill_if_here(Beat(**me, born=_born(os.getpid())))  # type: ignore[arg-type]
    assert killed == [os.getpid()]


def test_leaving_stops_the_heart_and_says_so(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, single_process_mesh(), 100.0)
    watchdog.clear()
    with watchdog:
        first = watchdog._read(0)  # at once: a rank that nobody has heard of could not be ended, when it stops
        assert first is not None and first.pid == os.getpid() and not first.left
        watchdog.mesh.trail.enter("update", 3)
    beat = watchdog._read(0)
    assert beat is not None and beat.left and beat.doing == "update of step 3" and watchdog.verdict() is None
    with Watchdog(tmp_path / "other", single_process_mesh(), None):
        pass
    assert not (tmp_path / "other").exists()
