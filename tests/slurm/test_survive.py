"""A run of two ranks through all that may happen to it on a real Slurm: it ends by itself, with the records of one that
was never disturbed, and its history names each cause.

Each start imports torch on both ranks: a quarter of an hour, together. tests/slurm/test_supervise.py has the same
faults one by one, without torch.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from moe_dist.chaos.judge import records
from moe_dist.train.record.effective_time import effective_time_of
from moe_dist.train.record.status import read_status
from tests.slurm.jobs import Run, Runs, virtual_nodes

pytestmark = pytest.mark.timeout(1800)
STEPS = 280
CONFIG = f"""
model: {{d_model: 32, num_layers: 2, num_heads: 4, d_ff: 48, moe: {{num_experts: 4, capacity_factor: 1.0}}}}
data: {{kind: text, paths: [FOLDER/text.txt]}}
parallel: {{ep: 2}}
optim: {{lr: 1.0e-3, warmup_steps: 0, schedule: constant}}
train: {{steps: {STEPS}, seq_len: 16, global_batch: 8, accumulation: 1, threads: 1}}
run: {{root: FOLDER/runs, eval_every: 100, eval_sequences: 16, save_every: 10, tensorboard: false, sample_tokens: 0}}
guard: {{stall_seconds: 15}}
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what runs read. Its name is short: sockets of Slurm lie below it."""
    folder = tmp_path_factory.mktemp("survive")
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(4000)))
    return folder


def undisturbed(runs: Runs, *flags: str) -> list[dict[str, Any]]:
    """Records of the same steps under torchrun, on this machine alone."""
    runs.cluster.run("bash", "launch/torchrun.sh", "2", runs.config, *flags, "--run.name", "torchrun")
    return records(runs.root / "torchrun")


def test_a_submitted_run_trains_like_torchrun(folder: Path) -> None:
    flags = ("--train.steps", "110")
    with virtual_nodes(folder, CONFIG, patience=300.0, count=2) as runs:
        run = runs.submit("plain", *flags)
        assert run.over()["Restarts"] == "0"
        assert read_status(run.folder) == {"state": "finished", "step": 110}, run.log.read_text()
        assert records(run.folder) == undisturbed(runs, *flags) and run.story() == [("finished", "stop")]
        assert "has finished its" in runs.cli("submit", runs.config, "--nodes", "2", "--run.name", "plain", *flags)


@pytest.mark.slow
def test_a_run_survives_ranks_nodes_cables_and_neighbours(folder: Path) -> None:
    """Four nodes with an address and a cable each, of which two train. A step puts 119 KiB on a cable: at this rate it
    takes a second, so that the run has not finished when Slurm comes round to it, in up to half a minute."""
    variables = {"MOE_DIST_CLUSTER_SILENT": "60"}  # so that a pulled cable is the run's to notice
    with virtual_nodes(folder, CONFIG, patience=300.0, count=4, rate="1mbit", **variables) as runs:
        run = runs.submit("faults", "--spare-nodes", "2")
        run.goes_on()
        run.limit(run.minutes() + 1)  # first: Slurm without accounting takes no new limit of a job that has lost a node
        run.ended(1)
        run.limit(None)
        run.goes_on()
        os.kill(run.process(1), signal.SIGKILL)
        run.ended(2)
        run.goes_on()
        os.kill(run.process(0), signal.SIGSTOP)
        run.ended(3)
        run.goes_on()
        lost = away_from_the_script(run)
        runs.lose(lost)
        run.ended(4)
        run.goes_on()
        runs.come_back(lost)
        unplugged = away_from_the_script(run)
        runs.cable(unplugged, "down")
        run.ended(5)
        run.goes_on()
        runs.lose(unplugged)  # and turned off and on: else Slurm asks what it took for lost at every 20th ping only
        runs.cable(unplugged, "up")
        runs.come_back(unplugged)
        run.goes_on(10)
        for preempted in range(5):
            runs.preempt()
            run.ended(6 + preempted)
            run.goes_on(10)
        run.over()
        assert read_status(run.folder) == {"state": "finished", "step": STEPS}, run.log.read_text()
        assert records(run.folder) == undisturbed(runs)
        faults = [(cause, "restart") for cause in ("rank died", "stalled", "node lost", "node lost")]
        taken = 5 * [("preempted", "requeue")]
        assert run.story() == [("time limit", "requeue"), *faults, *taken, ("finished", "stop")]
        assert lost in run.nodes()[3] and lost not in run.nodes()[4]
        assert unplugged in run.nodes()[4] and unplugged not in run.nodes()[5]
        time = effective_time_of(run.folder)
        assert time is not None and 0 < time.ratio < 1


def away_from_the_script(run: Run) -> str:
    """A node that trains, but not the one where the job's script runs."""
    return next(node for node in run.nodes()[-1] if node != "node1")
