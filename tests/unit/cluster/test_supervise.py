"""The supervisor of a job, with commands of Slurm that pretend: what it starts, on which nodes, how often, and why."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.cluster import history
from moe_dist.cluster.allocation import Allocation
from moe_dist.cluster.keeper import keep
from moe_dist.cluster.nodes import chosen, job_now, seconds_of
from moe_dist.cluster.supervise import main
from tests.unit.cluster.pretended import ROOT, Slurm

DIED = "mkdir -p ends; echo '{\"1\": -9}' >ends/b.json"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm(tmp_path / "tools", tmp_path / "runs/mine")
    monkeypatch.setattr(os, "environ", slurm.environ())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return slurm


def supervise(slurm: Slurm, *own: str, flags: tuple[str, ...] = (), **environ: str) -> int:
    config = slurm.run.parents[1] / "config.yaml"
    config.write_text(f"run: {{root: {slurm.run.parent}, name: mine}}\n")
    return main([*own, str(config), *flags], slurm.environ(**environ))


def story(slurm: Slurm) -> list[tuple[str, str, int]]:
    """(cause, what came next, step) of each start."""
    return [(line["cause"], line["next"], line["step"]) for line in history.read(slurm.run) if line["event"] == "end"]


def test_a_run_that_finishes_is_started_once(slurm: Slurm) -> None:
    slurm.start(leaves=0, step=40, state="finished")
    assert supervise(slurm, "--ranks-per-node=4", flags=("--train.steps", "40")) == 0
    assert story(slurm) == [("finished", "stop", 40)]
    (call,) = slurm.calls("srun")
    assert call[:3] == ["--export=ALL", "--overlap", "--nodes=3"] and "--kill-on-bad-exit=1" in call
    assert call[-8:-5] == ["bash", str(ROOT / "launch/torchrun.sh"), "4"]
    assert call[-4:] == ["--train.steps", "40", "--resume", "auto"]
    environ = (slurm.tools / "environ").read_text().splitlines()
    assert "NNODES=3" in environ and f"MOE_DIST_ENDS={slurm.run}/ends" in environ
    assert not [line for line in environ if line.startswith("SRUN_CPUS_PER_TASK")]


def test_a_rank_that_dies_is_started_again_on_another_node(slurm: Slurm) -> None:
    slurm.start(DIED, step=5, state="running")
    slurm.start(leaves=0, step=40, state="finished")
    assert supervise(slurm, "--spare-nodes=1") == 0
    assert story(slurm) == [("rank died", "restart", 5), ("finished", "stop", 40)]
    assert slurm.nodes_of_starts() == ["a,b", "a,c"]
    line = next(line for line in history.read(slurm.run) if line["event"] == "end")
    assert line["detail"] == "rank 1 on b died of signal 9 (SIGKILL)" and line["nodes"] == ["a", "b"]
    assert slurm.calls("scontrol") == []


def test_a_lost_node_is_replaced_by_a_spare_one_or_the_job_queued_again(slurm: Slurm) -> None:
    slurm.start(f"echo b >{slurm.tools}/dead", leaves=137, step=5, state="running")
    slurm.start("echo 'a UNLIMITED a,c' >$tools/where; echo 'c down*' >>$tools/nodes", step=9, state="running")
    assert supervise(slurm, "--spare-nodes=1") == 75
    assert story(slurm) == [("node lost", "restart", 5), ("node lost", "requeue", 9)]
    assert slurm.nodes_of_starts() == ["a,b", "a,c"]
    assert slurm.calls("scontrol") == [["requeue", "7"]]
    assert any("moe_dist.cluster.keeper" in call for call in slurm.calls("srun"))
    ends = [line for line in history.read(slurm.run) if line["event"] == "end"]
    assert ends[0]["detail"] == "b does not answer" and ends[1]["why"] == "too few nodes of this job answer"


def test_without_spares_nobody_keeps_watch(slurm: Slurm) -> None:
    slurm.start(leaves=0, state="finished", step=1)
    supervise(slurm)
    assert not any("moe_dist.cluster.keeper" in call for call in slurm.calls("srun"))


def test_a_run_that_saved_is_queued_again(slurm: Slurm) -> None:
    slurm.start(state="preempted", step=31, signal="SIGTERM")
    assert supervise(slurm) == 75
    assert story(slurm) == [("preempted", "requeue", 31)] and slurm.calls("scontrol") == [["requeue", "7"]]
    assert len(slurm.calls("srun")) == 1, "no node is doubted"


def test_faults_without_progress_come_to_an_end(slurm: Slurm) -> None:
    for _ in range(5):
        slurm.start(step=5, state="failed", code=77, reason="rank 1 has made no progress for 9 s")
    assert supervise(slurm, flags=("--guard.max-restarts", "2")) == 79
    assert [next_ for _, next_, _ in story(slurm)] == ["restart", "restart", "restart", "stop"]


@pytest.mark.parametrize(
    ("shell", "code"), [("mkdir -p ends; echo '{\"0\": 2}' >ends/a.json", 2), ("touch x", 1)], ids=["mistake", "error"]
)
def test_what_fails_before_its_first_step_would_again(slurm: Slurm, shell: str, code: int) -> None:
    slurm.start(shell)
    slurm.start(shell)
    assert supervise(slurm) == code
    assert story(slurm)[-1][1:] == ("stop", 0) and len(story(slurm)) == (1 if code == 2 else 2)


def test_the_status_of_an_earlier_start_explains_nothing(slurm: Slurm) -> None:
    slurm.run.mkdir(parents=True)
    (slurm.run / "status.json").write_text('{"state": "failed", "reason": "x", "code": 76}')
    slurm.start(DIED)
    slurm.start(leaves=0, state="finished", step=40)
    assert supervise(slurm) == 0 and story(slurm)[0][0] == "rank died"


def test_the_end_of_a_start_whose_supervisor_was_lost_is_told_by_the_next(slurm: Slurm) -> None:
    history.append(slurm.run, "start", start=1, job="7", nodes=["a", "b"], step=0, saved=0)
    slurm.start(leaves=0, state="finished", step=40)
    assert supervise(slurm, SLURM_RESTART_COUNT="1") == 0
    assert [line.get("start") for line in history.read(slurm.run)] == [1, 1, 2, 2]
    assert [cause for cause, _, _ in story(slurm)] == ["node lost", "finished"]


def test_a_run_that_another_job_has_is_left_alone(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    history.append(slurm.run, "start", start=1, job="6", nodes=["a", "b"], step=0, saved=0)
    slurm.say(queue="6 6 6 RUNNING\n")
    assert supervise(slurm) == 2
    assert "is in use by job 6" in capsys.readouterr().err and len(history.read(slurm.run)) == 1
    slurm.say(queue="")
    slurm.start(leaves=0, state="finished", step=40)
    assert supervise(slurm) == 0 and [cause for cause, _, _ in story(slurm)] == ["cancelled", "finished"]


def test_a_cancelled_run_is_neither_started_nor_queued_again(slurm: Slurm) -> None:
    slurm.start(
        'echo \'{"event": "cancel", "job": "7"}\' >>history.jsonl', step=31, state="preempted", signal="SIGUSR2"
    )
    assert supervise(slurm) == 75
    assert story(slurm) == [("cancelled", "stop", 31)] and slurm.calls("scontrol") == []
    slurm.start(leaves=0, state="finished", step=40)
    assert supervise(slurm) == 0, "handed in again, it goes on"


def test_a_job_that_may_not_be_queued_again_says_so(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm.tools / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    slurm.start(state="preempted", step=31, signal="SIGUSR2")
    assert supervise(slurm) == 75
    assert "job 7 is not queued again" in capsys.readouterr().out


def test_slurm_is_told_of_neither_shell_nor_pattern(slurm: Slurm, tmp_path: Path) -> None:
    slurm.start(leaves=0, state="finished", step=1)
    hostile = ("--data.paths", f"$(touch {tmp_path}/canary)", "`touch canary`", "a;touch canary", "-x\ny")
    assert supervise(slurm, "--srun=--cpu-bind=$(touch canary)", "--within=a b", flags=hostile) == 0
    (call,) = slurm.calls("srun")
    assert "--cpu-bind=$(touch canary)" in call and "a b" in call and call[-7:-2] == list(hostile)
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        ({}, 1),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "h100:8"}, 8),
    ],
)
def test_ranks_of_a_node(slurm: Slurm, environ: dict[str, str], ranks: int) -> None:
    assert Allocation.of(slurm.environ(**environ), None, 0).ranks == ranks
    assert Allocation.of(slurm.environ(**environ), 3, 1).ranks == 3


def test_the_one_task_of_a_node_gets_the_cpus_of_all(slurm: Slurm) -> None:
    slurm.start(leaves=0, state="finished", step=1)
    supervise(slurm, SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="3")
    assert "SRUN_CPUS_PER_TASK=6" in (slurm.tools / "environ").read_text().splitlines()


@pytest.mark.parametrize(
    ("environ", "own", "said"),
    [
        ({"RANKS_PER_NODE": "a[$(touch canary)]"}, (), "RANKS_PER_NODE='a[$(touch canary)]' is no number"),
        ({"SLURM_CPUS_PER_TASK": "$(touch canary)"}, (), "SLURM_CPUS_PER_TASK='$(touch canary)' is no number"),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "8"}, (), "leaves a node's one task here fewer GPUs"),
        ({}, ("--spare-nodes=3",), "--spare-nodes 3 leaves 0 of the job's nodes"),
        ({"SLURM_JOB_NODELIST": ""}, (), "the launcher set no SLURM_JOB_NODELIST"),
    ],
)
def test_what_is_wrong_is_said(
    slurm: Slurm, environ: dict[str, str], own: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervise(slurm, *own, **environ) == 2
    assert said in capsys.readouterr().err and slurm.calls("srun") == []


def test_without_a_history_nothing_is_started(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody could tell whether the run gets further."""
    (slurm.run / history.FILE).mkdir(parents=True)
    assert supervise(slurm) == 1
    assert "Is a directory" in capsys.readouterr().err and slurm.calls("srun") == []


def test_times_and_nodes() -> None:
    times = {"1-02:03:04": 93784.0, "2:00:00": 7200.0, "5:00": 300.0, "0:07": 7.0, "UNLIMITED": None, "INVALID": 0.0}
    assert {text: seconds_of(text) for text in times} == times
    assert chosen("abcd", 2, {}) == ("a", "b") and chosen("abcd", 2, {"a": 1, "c": 2}) == ("b", "d")
    assert chosen("abcd", 3, {"a": 1, "b": 2}) == ("a", "c", "d") and chosen("ab", 3, {}) == ("a", "b")


def test_a_job_is_queued_again_when_it_has_lost_the_node_of_its_script(slurm: Slurm) -> None:
    slurm.say(where="a 5:00 b,c\n")
    assert job_now("7").nodes == ("b", "c") and job_now("7").seconds_left == 300.0
    keep("7", every=0.01)
    assert slurm.calls("scontrol") == [["requeue", "7"]]


def batch(slurm: Slurm, *words: str, **environ: str) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "slurm/train.sbatch"), *words]
    known = {"MOE_DIST_ROOT": str(ROOT), "MOE_DIST_PYTHON": sys.executable}
    return subprocess.Popen(
        command, env=slurm.environ(**(known | environ)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def written(slurm: Slurm, name: str = "config.yaml", **sections: Any) -> str:
    config = slurm.run.parents[1] / name
    config.write_text(json.dumps({"run": {"root": str(slurm.run.parent), "name": "mine"}} | sections))
    return str(config)


@pytest.mark.parametrize(
    ("requeues", "cause", "then", "code"), [("0", "cancelled", "stop", 1), ("1", "taken back", "requeue", 75)]
)
def test_what_slurm_ends_is_left_to_slurm(
    slurm: Slurm, requeues: str, cause: str, then: str, code: int, wait: Callable[..., None]
) -> None:
    slurm.start("sleep 60 & wait", state="running")
    slurm.say(requeues=requeues)
    job = batch(slurm, written(slurm))
    wait(lambda: (slurm.run / "status.json").exists())
    job.send_signal(signal.SIGTERM)
    subprocess.run(["pkill", "-TERM", "-P", str(job.pid)], check=True)  # Slurm signals all that the script started
    assert job.wait(60) == code
    assert story(slurm) == [(cause, then, 0)] and slurm.calls("scontrol") == []


def test_a_site_is_the_file_that_is_named(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other of that name on the PATH."""
    (tmp_path / "site.sh").write_text("exit 9\n")
    (slurm.tools / "site.sh").write_text("exit 8\n")
    monkeypatch.chdir(tmp_path)
    job = batch(slurm, "config.yaml", MOE_DIST_SITE="site.sh")
    assert job.communicate(timeout=60) and job.returncode == 9


@pytest.fixture
def wait() -> Callable[..., None]:
    import time

    def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.05)

    return until


def test_a_hostile_environment_is_refused_or_inert(slurm: Slurm, tmp_path: Path) -> None:
    """As the batch script itself reads it: canary files would appear where it runs, or in the folder of the test."""
    site = tmp_path / "a; touch canary $(touch canary).sh"
    site.write_text('srun_options+=("--cpu-bind=none;touch canary")\nwithin+=(env "X=$(printf \'`touch canary`\')")\n')
    slurm.start(leaves=0, state="finished", step=1)
    config = written(slurm, "-c $(touch canary)\n`touch canary`.yaml")
    job = batch(slurm, config, "--run.sample-tokens", "0", MOE_DIST_SITE=str(site), SLURM_NTASKS_PER_NODE="1")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    (call,) = slurm.calls("srun")
    assert "--cpu-bind=none;touch canary" in call and "X=`touch canary`" in call and config in call
    for name in (
        "RANKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_CPUS_PER_TASK",
        "SLURM_JOB_NUM_NODES",
        "SLURM_JOB_ID",
    ):
        job = batch(slurm, config, **{name: "a[$(touch canary)]"})
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 2 and f"{name}='a[$(touch canary)]' is no number" in said
    for name in ("MOE_DIST_ROOT", "MOE_DIST_SITE"):
        job = batch(slurm, config, **{name: "$(touch canary)\n;touch canary"})
        assert job.communicate(timeout=60)[0] and job.returncode == 2
    assert len(slurm.calls("srun")) == 1
    assert not list(tmp_path.rglob("canary")) and not (ROOT / "canary").exists() and not Path("canary").exists()
