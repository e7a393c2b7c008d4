"""One run in a folder: refused by name while the holder lives, free as soon as it is gone, however it went."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist import disk
from moe_dist.train.record.status import LOCK
from moe_dist.train.run_lock import run_lock
from tests.unit.checkpoint.helpers import alone

HOLDER = """
import sys, time
from pathlib import Path
from moe_dist.train.run_lock import run_lock
from tests.unit.checkpoint.helpers import alone
with alone(), run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with alone():
        yield


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        words = rf"run is in use by process {holder.pid} on .+, since 20..-.*choose another --run.name"
        with pytest.raises(ValueError, match=words), run_lock(folder):
            raise AssertionError("two hold it")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert f'"pid": {holder.pid}' in (folder / LOCK).read_text()  # it left its name behind, and keeps nobody out
    (folder / "metrics.jsonl").write_text("")
    with run_lock(folder), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), run_lock(folder):
        pass
    assert (folder / LOCK).read_text() == ""
    with run_lock(folder):
        pass


def test_a_lock_that_goes_in_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an NFS server drops that of a machine that was lost."""
    holding = threading.Event()

    def hold() -> None:
        with disk.locked(tmp_path / LOCK):
            holding.set()
            time.sleep(1.0)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    with pytest.raises(ValueError, match="in use by another process"), run_lock(tmp_path):
        pass
    monkeypatch.setenv("MOE_DIST_LOCK_SECONDS", "60")
    with run_lock(tmp_path):
        assert not holder.is_alive() or holder.join() is None
    holder.join()


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    """With the rights and the striping that somebody gave it."""
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("not to be emptied")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="run cannot be written to"), run_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "not to be emptied"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    said: list[str] = []
    with run_lock(tmp_path, said.append):
        pass
    assert len(said) == 1 and "Operation not supported" in said[0] and "nothing keeps a second run out" in said[0]
