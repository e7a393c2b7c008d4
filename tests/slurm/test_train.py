"""slurm/train.sbatch on two nodes: the same losses as under torchrun, also when a signal stops it on the way.

A virtual node may have fewer CPUs than tasks here: hence --overcommit.
"""

import json
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.store import checkpoints
from moe_dist.train.record.status import read_status
from tests.slurm.conftest import ROOT, Cluster, wait_until

pytestmark = pytest.mark.timeout(480)
PATIENCE = 150.0  # seconds for one job, where other tests use the cores too

STEPS, SIGNALLED_AFTER = 150, 20
CONFIG = """
model: {{d_model: 32, num_layers: 2, num_heads: 4, d_ff: 48, moe: {{num_experts: 4, capacity_factor: 1.0}}}}
data: {{kind: text, paths: [{texts}]}}
parallel: {{ep: 2}}
engine: {{name: deepspeed, zero_stage: 1}}
optim: {{lr: 1.0e-3, warmup_steps: 0, schedule: constant}}
train: {{steps: {steps}, seq_len: 16, global_batch: 8, accumulation: 1, threads: 1}}
run: {{root: {runs}, eval_every: 50, eval_sequences: 16, save_every: 1000}}
"""


@dataclass(frozen=True)
class Study:
    """A configuration, where its runs are, and the losses of an undisturbed run under torchrun."""

    config: Path
    runs: Path
    expected: list[dict[str, Any]]


@pytest.fixture(scope="module")
def study(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    texts, runs, config = folder / "texts", folder / "runs", folder / "a; touch oops $(touch oops).yaml"
    texts.mkdir()
    pick = random.Random(0)
    for name in range(8):
        (texts / f"{name}.txt").write_text(
            " ".join(pick.choices("the a red blue fish bird swims flies".split(), k=2000))
        )
    config.write_text(CONFIG.format(texts=texts, runs=runs, steps=STEPS))
    cluster.run("bash", "launch/torchrun.sh", "2", config, "--run.name", "torchrun")
    return Study(config, runs, losses(runs / "torchrun"))


def losses(run: Path) -> list[dict[str, Any]]:
    """All that a step says about the model, without what depends on the machine."""
    of_interest = ("step", "loss", "aux_loss", "grad_norm", "drop_rate", "validation_loss")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: record.get(name) for name in of_interest} for record in records]


def steps_logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_two_nodes_train_like_torchrun(cluster: Cluster, study: Study, tmp_path: Path) -> None:
    log, run = tmp_path / "job.out", study.runs / "two-nodes"
    job = cluster.submit(log, study.config, "--run.name", run.name)
    details = cluster.wait_for_end(job, log, 120)
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "0"), log.read_text()
    assert losses(run) == study.expected
    assert len(study.expected) == STEPS
    assert not (ROOT / "oops").exists(), "some shell took the name of the configuration for a command"

    # A finished run is left alone: the job ends at once, well.
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    job = cluster.submit(log, study.config, "--run.name", run.name)
    assert cluster.wait_for_end(job, log, PATIENCE)["JobState"] == "COMPLETED", log.read_text()
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow  # test_a_job_near_its_time_limit_saves_and_is_queued_again is the quick one
def test_a_signal_saves_requeues_and_changes_nothing(cluster: Cluster, study: Study, tmp_path: Path) -> None:
    log, run = tmp_path / "job.out", study.runs / "signalled"
    job = cluster.submit(log, study.config, "--run.name", run.name)
    wait_until(lambda: steps_logged(run) >= SIGNALLED_AFTER, PATIENCE, log)
    cluster.run("scancel", "--signal=USR2", job)

    wait_until(lambda: read_status(run)["state"] != "running", 30, log)
    status = read_status(run)
    assert (status["state"], status["signal"]) == ("preempted", "SIGUSR2"), log.read_text()
    assert SIGNALLED_AFTER <= status["step"] < STEPS
    assert [found.name for found in checkpoints(run / "checkpoints")] == [f"step-{status['step']:06d}"]

    details = cluster.wait_for_end(job, log, 120)
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert read_status(run) == {"state": "finished", "step": STEPS}
    assert losses(run) == study.expected


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster, study: Study, tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    job = cluster.submit(log, study.config, "--run.name", "wrong", "--parallel.ep", "3")
    details = cluster.wait_for_end(job, log, PATIENCE)
    assert (details["JobState"], details["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert "ep" in log.read_text()


def test_tasks_of_a_step_train_like_torchrun(cluster: Cluster, study: Study) -> None:
    train = [sys.executable, "-m", "moe_dist.cli", "train", study.config, "--run.name", "tasks", "--train.steps", "20"]
    cluster.run("srun", "--nodes=1", "--ntasks=2", "--overcommit", "--kill-on-bad-exit=1", *train)
    found = losses(study.runs / "tasks")
    assert len(found) == 20 and found[:19] == study.expected[:19]  # the last step is evaluated too


def test_two_tasks_a_node_are_ranks_of_one_run(cluster: Cluster, study: Study, tmp_path: Path) -> None:
    """Not runs of their own, of which one ends the other. The job sees nothing of our environment, so the repository
    that it is submitted from has a .venv of its own."""
    log, run, root = tmp_path / "job.out", study.runs / "four", tmp_path / "repository"
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for name in ("launch", "moe_dist", "slurm"):
        (root / name).symlink_to(ROOT / name)
    asked = ("--ntasks-per-node=2", "--overcommit", "--export=NONE", f"--output={log}", "slurm/train.sbatch")
    flags = ("--run.name", run.name, "--train.steps", "5")
    job = cluster.run("sbatch", "--parsable", *asked, study.config, *flags, folder=root)
    details = cluster.wait_for_end(job, log, 120)
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "0"), log.read_text()
    assert read_status(run) == {"state": "finished", "step": 5}
    assert "2 nodes x 2 ranks" in log.read_text() and "world 4 = dp 4" in log.read_text()
