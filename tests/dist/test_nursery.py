"""Ranks of tests: processes of their own for each test, errors that say what happened, nothing left behind."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.dist import nursery
from tests.dist.nursery import RankError, on_ranks


def note(folder: str) -> None:
    """What this rank is like goes to a file; then it spoils what it can."""
    total = torch.ones(1)
    dist.all_reduce(total)
    facts = (os.getpid(), hash("a string"), os.environ["NOTED"], os.getcwd(), int(total), "spoilt" in sys.modules)
    Path(folder, f"{dist.get_rank()}-{os.environ['NOTED']}").write_text(json.dumps(facts))
    os.environ["NOTED"] = "by another test"
    sys.modules["spoilt"] = os
    torch.set_default_dtype(torch.float64)


def test_each_test_has_ranks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes = {}
    for turn in ("first", "second"):
        monkeypatch.setenv("NOTED", turn)
        on_ranks(note, 2, str(tmp_path))
        notes[turn] = [json.loads(Path(f"{rank}-{turn}").read_text()) for rank in range(2)]
    facts = [fact for turn in notes.values() for fact in turn]
    assert len({process for process, *_ in facts} | {os.getpid()}) == 5
    assert [hashed for _, hashed, *_ in notes["first"]] == [hashed for _, hashed, *_ in notes["second"]]
    assert len({hashed for _, hashed, *_ in notes["first"]}) == 2  # sets are in another order on another rank
    rest = [others for _, _, *others in facts]
    assert rest == [[turn, str(tmp_path), 2, False] for turn in ("first", "first", "second", "second")]


def raise_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("what the rank said")
    time.sleep(1000)


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_on_one() -> None:
    if dist.get_rank() == 1:
        sys.exit(7)
    dist.barrier()


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        (raise_on_one, ["rank 1 of 2 raised\nTraceback", "in raise_on_one", "ValueError: what the rank said\n"]),
        (raise_on_one, ["rank 0 of 2 was killed by SIGKILL"]),
        (die_on_one, ["rank 1 of 2 was killed by SIGKILL\nrank 0 of 2 raised\nTraceback", "in die_on_one"]),
        (leave_on_one, ["rank 1 of 2 exited with 7\nrank 0 of 2 raised\nTraceback", "in leave_on_one"]),
    ],
)
def test_a_failing_rank_fails_the_test_and_ends_the_others(
    worker: object, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "GRACE", 0.5 if worker is raise_on_one else 30.0)
    with pytest.raises(RankError) as caught:
        on_ranks(worker, 2)
    for word in words:
        assert word in str(caught.value)
    on_ranks(dist.barrier, 2)


def hang(folder: str) -> None:
    Path(folder, f"pid-{os.getpid()}").touch()
    time.sleep(1000)


def test_ranks_do_not_outlive_a_test_whose_time_is_over(tmp_path: Path) -> None:
    """pytest-timeout raises in the main thread, as this alarm does."""

    def over(*_: object) -> None:
        if len(list(tmp_path.glob("pid-*"))) == 2:
            raise TimeoutError("over")
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError, match="over"):
            on_ranks(hang, 2, str(tmp_path))
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    for path in tmp_path.glob("pid-*"):
        assert not Path("/proc", path.name.removeprefix("pid-")).exists()
    on_ranks(dist.barrier, 2)
