"""Several points at once, points that fail, files that cannot be written, and kills at any moment."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_dist.cli import main
from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.runner import Runner
from moe_dist.study.shares import Share, environment, shares
from tests.unit.study.helpers import STUDY, Pretend, toy_study, write_study

CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="two points at once need two cores")

# Goes on once two points have been seen running at the same time; writes down what it was given.
MEET = """
folder, deadline = run.parent.parent, time.monotonic() + 30
(run / 'share.json').write_text(json.dumps([sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]))
(folder / f'here-{os.getpid()}').touch()
while len(list(folder.glob('here-*'))) < 2 and time.monotonic() < deadline: time.sleep(0.01)
(folder / f'most-{len(list(folder.glob("here-*")))}').touch()
time.sleep(0.1)
(folder / f'here-{os.getpid()}').unlink()
if len(list(folder.glob('most-*'))) == 0: sys.exit('nobody came')
"""

# A step every few milliseconds, the number of the last one kept; SIGTERM saves and leaves.
STEPS = """
import signal
kept = run / 'kept'
def put(text, path):
    (run / 'draft').write_text(text)
    os.replace(run / 'draft', path)
def tell(**status):
    put(json.dumps(status), run / 'status.json')
def leave(number, frame):
    tell(state='preempted', step=int(kept.read_text()), signal=number)
    sys.exit(75)
at = int(kept.read_text()) if kept.exists() else 0
put(str(at), kept)
signal.signal(signal.SIGTERM, leave)
tell(state='running')
for step in range(at, 40):
    time.sleep(0.01)
    put(str(step + 1), kept)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""


def measured(study: Study) -> list[dict[str, Any]]:
    """The finished lines by point, times and what depends on the folder aside."""
    records = [record for record in Ledger(study.ledger).records() if record["status"] == "finished"]
    aside = {"started", "run", "attempt"}
    kept = [{name: value for name, value in record.items() if name not in aside} for record in records]
    return sorted(kept, key=lambda record: str(record["point"]))


def test_cores_and_gpus_are_divided() -> None:
    def cores(*args: Any) -> list[list[int]]:
        return [sorted(share.cores) for share in shares(*args)]

    assert cores(3, 1, set(range(8)), []) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert cores(2, 1, {1, 5, 8}, []) == [[1, 5], [8]]
    assert cores(1, 1, {1, 5}, ["0", "1"]) == [[1, 5]]
    assert [share.gpus for share in shares(2, 2, {0, 1}, ["0", "1", "2", "3"])] == [("0", "1"), ("2", "3")]
    assert [share.gpus for share in shares(2, 2, {0, 1}, ["0", "1", "2"])] == [None, None]
    with pytest.raises(ValueError, match="at_once=3 is more than the 2 cores"):
        shares(3, 1, {0, 1}, [])


@pytest.mark.parametrize(
    ("at_once", "ranks", "own", "threads"),
    [(2, 1, None, "4"), (2, 2, None, "2"), (2, 8, None, "1"), (2, 1, "1", "1"), (2, 1, "64", "4"), (1, 1, None, None)],
)
def test_threads_follow_the_share(at_once: int, ranks: int, own: str | None, threads: str | None) -> None:
    environ = {} if own is None else {"OMP_NUM_THREADS": own}
    given = environment(Share(frozenset(range(4)), ("2", "3")), at_once, ranks, environ | {"SLURM_PROCID": "1"})
    assert given.get("OMP_NUM_THREADS") == threads and given["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "SLURM_PROCID" not in given


@needs_two_cores
def test_two_points_at_once_share_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    path, train = write_study(tmp_path, STUDY + "at_once: 1\n"), Pretend(tmp_path, MEET)
    monkeypatch.setattr("moe_dist.study.run.runner.Runner", partial(Runner, command=train))
    assert main(["study", "run", str(path), "--at-once", "2"]) == 0  # it wins over the file's
    study = load_study(path)
    given = [json.loads((point.run / "share.json").read_text()) for point in study.points]
    half = (len(CORES) + 1) // 2
    assert {tuple(cores) for cores, _ in given} == {tuple(CORES[:half]), tuple(CORES[half:])}
    assert all(threads == str(len(cores)) for cores, threads in given)
    assert [path.name for path in study.folder.glob("most-*")] == ["most-2"]
    assert sorted(os.sched_getaffinity(0)) == CORES  # the runner has them all again


@needs_two_cores
def test_a_signal_lets_all_running_points_save(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path, STUDY + "at_once: 2\n"), Pretend(tmp_path, STEPS)
    runner = Runner(study, command)
    asked: list[int] = []

    def looks(*args: Any) -> None:
        kept = [point.run / "kept" for point in study.points[:2]]
        if not asked and all(path.exists() and int(path.read_text()) > 3 for path in kept):
            asked.append(1)
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_dist.study.run.runner._LOOK", 0.02)
        patch.setattr("moe_dist.study.run.live.Screen.show", looks)
        assert runner.run(study.points) == os.EX_TEMPFAIL
    for point in study.points[:2]:
        status = json.loads((point.run / "status.json").read_text())
        assert status["state"] == "preempted" and 3 < status["step"] < 40
    assert Ledger(study.ledger).records() == [] and len(command.trained()) == 2
    assert Runner(study, command).run(study.points) == 0
    assert len(command.trained()) == 6


def test_a_failed_point_is_tried_again_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says why with the end of its log, of this attempt alone; the count goes on in the next start."""
    study = toy_study(tmp_path, STUDY.replace("retries: 0", "retries: 2"))
    command = Pretend(tmp_path, "if seed == 0:\n    for n in range(30): print('line', n)\n    sys.exit('no\\x00 luck')")
    names = [point.name for point in study.points]
    command.mend("count = run / 'count'; count.open('a').write('x')\nif seed and len(count.read_text()) < 3:\n"
    "    for n in range(30): print('line', n, len(count.read_text()))\n    sys.exit('no luck')")  # fmt: skip
    assert Runner(study, command).run(study.points) == 0
    assert command.trained() == [*names, names[1], names[3], names[1], names[3]]
    records = [record for record in Ledger(study.ledger).records() if record["point"] == names[1]]
    assert [(each["status"], each["attempt"]) for each in records] == [("failed", 1), ("failed", 2), ("finished", 3)]
    assert records[1]["log_tail"] == [*(f"line {n} 2" for n in range(11, 30)), "no luck"]
    assert "will be tried again" in capsys.readouterr().out

    other = tmp_path / "other"
    other.mkdir()
    study, command = toy_study(other, STUDY.replace("retries: 0", "retries: 1")), Pretend(other, "sys.exit('bad luck')")
    for _ in range(2):
        assert Runner(study, command).run(study.points[:2]) == 1
    said = capsys.readouterr().out
    assert f"0 of 2 points have finished; failed: {names[0]}, {names[1]}" in said
    assert said.count("\n    bad luck\n") == 4  # for each point in each start
    assert f"{names[0]}  failed (attempt 4): exit code 1; " in said
    assert [record["attempt"] for record in Ledger(study.ledger).records()] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_run_that_says_the_same_twice_has_still_failed_by_its_own_word(tmp_path: Path) -> None:
    study = toy_study(tmp_path, STUDY.replace("retries: 0", "retries: 1"))
    failing = "(run / 'status.json').write_text(json.dumps(dict(state='failed', reason='nan\\nat 3'))); sys.exit(1)"
    assert Runner(study, Pretend(tmp_path, failing)).run(study.points[:1]) == 1
    assert [record["reason"] for record in Ledger(study.ledger).records()] == ["nan at 3", "nan at 3"]


def test_what_cannot_be_read_fails_one_point(tmp_path: Path) -> None:
    """Not the study: a status that is no JSON, and a run that says it has finished without any metrics."""
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    for point, status in zip(study.points, ["{", '{"state": "finished", "step": 8}'], strict=False):
        point.run.mkdir(parents=True)
        (point.run / "status.json").write_text(status)
    assert Runner(study, command).run(study.points) == 1
    records = Ledger(study.ledger).latest()
    assert [records[point.name]["status"] for point in study.points] == ["failed", "failed", "finished", "finished"]
    assert "status.json cannot be read" in records[study.points[0].name]["reason"]
    assert "trained, but cannot be measured: " in records[study.points[1].name]["reason"]


def test_a_line_that_is_lost_is_recorded_again_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, command = write_study(tmp_path), Pretend(tmp_path)
    study = load_study(path)
    monkeypatch.setattr("moe_dist.study.run.runner.Runner", partial(Runner, command=command))
    assert main(["study", "run", str(path)]) == 0
    assert f"moe-dist: {path}: 2 seeds: the report gives intervals and verdicts from 3 on" in capsys.readouterr().err
    before, lines = measured(study), study.ledger.read_bytes().splitlines(keepends=True)
    study.ledger.write_bytes(b"".join([lines[0], b"\xff" + lines[1][9:], *lines[2:]]))
    monkeypatch.setattr("moe_dist.study.report.report.write_report", lambda study, latest: [study.folder])
    capsys.readouterr()
    for command_line in (["list"], ["run"], ["report"]):
        assert main(["study", *command_line, str(path)]) == 0
        assert f"moe-dist: {study.ledger}, line 2 cannot be read, and is left out: " in capsys.readouterr().err
    assert measured(study) == before and len(command.trained()) == 4


def running(command: Pretend) -> list[int]:
    """Processes that train, whoever started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if str(command.script) in (process / "cmdline").read_text().split("\0"):
                found.append(int(process.name))
    return found


def in_fork(work: Any) -> multiprocessing.process.BaseProcess:
    """Everything is imported already."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@needs_two_cores
def test_a_full_disk_ends_in_a_line_and_the_next_start_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ledger may not grow: the point beside saves and leaves, and nothing is trained twice."""
    study, command = (
        toy_study(tmp_path, STUDY + "at_once: 2\n"),
        Pretend(tmp_path, "if seed:" + STEPS.replace("\n", "\n  ")),
    )
    Ledger(study.ledger).append({"point": "old", "status": "failed", "fill": "x" * 200_000})
    whole = study.ledger.read_bytes()

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, resource.RLIM_INFINITY))
        os._exit(Runner(study, command).run(study.points))

    process = in_fork(full)
    process.join()
    assert process.exitcode == 1
    assert f"stopped: [Errno 27] File too large: '{study.ledger}'; when that is mended" in capfd.readouterr().out
    assert study.ledger.read_bytes() == whole
    assert Runner(study, command).run(study.points) == 0
    assert len(measured(study)) == 4
    assert Counter(command.trained())[study.points[0].name] == 1


@needs_two_cores
def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    """Ten, of the runner or of a point, also one that a killed runner has left behind."""
    text = STUDY.replace("retries: 0", "retries: 10\nat_once: 2").replace("[0, 1]", "[0, 1, 2]")
    by, folders = random.Random(5), (tmp_path / "calm", tmp_path / "killed")
    for folder in folders:
        folder.mkdir()
    calm, killed = (toy_study(folder, text) for folder in folders)
    assert Runner(calm, Pretend(folders[0])).run(calm.points) == 0

    command, victims = Pretend(folders[1], STEPS), Counter[str]()

    def start() -> multiprocessing.process.BaseProcess:
        return in_fork(lambda: os._exit(Runner(killed, command).run(killed.points)))

    runner = start()
    for victim in by.sample(["runner", "point"] * 5, 10):
        time.sleep(by.uniform(0.0, 0.3))
        if victim == "point":
            while not (points := running(command)):
                assert runner.is_alive(), "the study ended before it was killed ten times"
            os.kill(by.choice(points), signal.SIGKILL)
        else:
            assert runner.is_alive(), "the study ended before it was killed ten times"
            runner.kill()
            runner.join()
            runner = start()
        victims[victim] += 1
    runner.join()
    assert runner.exitcode == 0
    assert measured(killed) == measured(calm)
    failed = [record for record in Ledger(killed.ledger).records() if record["status"] == "failed"]
    assert all(record["reason"].startswith("killed by SIGKILL") for record in failed)
    assert len(failed) <= victims["point"]
    assert len(command.trained()) <= 6 + sum(victims.values()) + len(failed)
