import errno
import json
import os
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path

import pytest

from moe_dist.parallel.trail import Trail
from moe_dist.train.exit_codes import STALLED
from moe_dist.train.health.watchdog import Age, Beat, Watchdog, _born, _kill_if_here


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
    assert trail.describe() == "update of step 12, after all_reduce over ranks 0 to 3"


def test_a_pid_used_again_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    me = {"rank": 0, "host": os.uname().nodename, "pid": os.getpid(), "number": 1, "count": 1, "idle": 0.0, "doing": ""}
    _kill_if_here(Beat(**me, born="1"))  # type: ignore[arg-type]
    _kill_if_here(Beat(**me | {"host": "elsewhere"}, born=_born(os.getpid())))  # type: ignore[arg-type]
    assert killed == []
    _kill_if_here(Beat(**me, born=_born(os.getpid())))  # type: ignore[arg-type]
    assert killed == [os.getpid()]


@pytest.mark.parametrize("broken", ["folder", "write"])
def test_a_verdict_that_cannot_be_written_is_acted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    watchdog = Watchdog(tmp_path, 0, 1, Trail(), 0.1)
    watchdog.clear()

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "folder":
        watchdog.folder.rmdir()
    else:
        monkeypatch.setattr(os, "write", full)
    watchdog._pronounce("rank 0 stands still", [])
    assert left == [STALLED] and "rank 0 stands still (not written to" in capsys.readouterr().err
    monkeypatch.undo()
    watchdog.clear()
    assert watchdog._write_verdict("later", []) and watchdog.verdict() == []  # nothing is left in its way


def test_leaving_in_order_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, Trail(), 100.0) as watchdog:
        assert watchdog._read(0) is not None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="refused"), Watchdog(tmp_path, 0, 1, Trail(), 100.0):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with Watchdog(tmp_path / "other", 0, 1, Trail(), None):
        pass
    assert not (tmp_path / "other").exists()


def test_leaving_by_an_error_stops_the_heart_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost"), Watchdog(tmp_path, 0, 1, Trail(), 100.0) as watchdog:
        watchdog.trail.enter("update", 3)
        raise RuntimeError("lost")
    beat = watchdog._read(0)
    assert beat is not None and beat.left and beat.doing == "update of step 3" and watchdog.verdict() is None


class Others:
    """Beats of ranks 1 and on, written as their threads would."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog, self.said, self.numbers = watchdog, list[str](), count()
        watchdog._pronounce = lambda reason, *_: self.said.append(reason)  # type: ignore[method-assign]

    def beat(self, rank: int, number: int, notes: int, idle: float) -> None:
        beat = Beat(
            rank=rank, host="elsewhere", pid=1, born="1", number=number, count=notes, idle=idle, doing="all_reduce"
        )
        self.watchdog._path(rank).write_text(json.dumps(asdict(beat)))

    def judged(self, *ranks: tuple[int, float]) -> str | None:
        """What is said of ranks 1 and on, each by its count and for how long it has been idle; all alive."""
        sleep = time.sleep

        def beating(seconds: float) -> None:
            number = next(self.numbers)
            for rank, (notes, idle) in enumerate(ranks, 1):
                self.beat(rank, number, notes, idle)
            sleep(0.001)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", beating)
            self.watchdog._judge()
        return self.said.pop() if self.said else None


def test_only_who_stands_still_is_blamed(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 3, Trail(), 10.0)
    watchdog.clear()
    others = Others(watchdog)
    watchdog.trail.enter("forward", 1)
    watchdog._own.see((1, 0), 0.0)
    watchdog._own.seconds = 10.0
    watchdog._beat()
    assert others.judged((1, 10.0), (1, 3.0)) is None  # rank 2 computes, or writes, and the others wait for it
    said = others.judged((0, 9.5), (1, 10.0))
    assert said is not None and said.startswith("rank 1 (elsewhere") and "its process runs" in said, said
    watchdog.trail.step = 0
    assert others.judged((0, 9.5), (1, 10.0)) is None  # before the first step
