"""Runs that `moe-dist submit` hands to a real Slurm of three nodes, and what may happen to them there: they end by
themselves, with the records of an undisturbed run, and their history names each cause.

Heavy: each start of a run imports torch on every rank. `lose` and `--preempt` are of slurm/local_cluster.sh.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_dist.chaos.judge import records
from moe_dist.cluster import history
from moe_dist.cluster.status import effective_ratio
from moe_dist.train.record.history import last_logged_step
from moe_dist.train.record.status import read_status
from tests.slurm.conftest import ROOT, Cluster, _free_ports, _missing, wait_until

pytestmark = pytest.mark.timeout(1500)
SCRIPT = str(ROOT / "slurm/local_cluster.sh")
PATIENCE = 300.0  # seconds for a start of a run, where other tests use the cores too
STEPS = 400
CONFIG = """
model: {{d_model: 32, num_layers: 2, num_heads: 4, d_ff: 48, moe: {{num_experts: 4, capacity_factor: 1.0}}}}
data: {{kind: text, paths: [{folder}/text.txt]}}
parallel: {{ep: 2}}
optim: {{lr: 1.0e-3, warmup_steps: 0, schedule: constant}}
train: {{steps: {steps}, seq_len: 16, global_batch: 8, accumulation: 1, threads: 1}}
run:
  {{root: {folder}/runs, eval_every: 100, eval_sequences: 16, save_every: 10, tensorboard: false, sample_tokens: 0}}
guard: {{stall_seconds: 15}}
"""


@dataclass(frozen=True)
class Runs:
    """Of one configuration: where they lie, and the records of one that torchrun trained without trouble."""

    cluster: Cluster
    config: Path
    root: Path

    def cli(self, *words: str | Path, refused: bool = False) -> str:
        return self.cluster.run(sys.executable, "-m", "moe_dist.cli", *words, refused=refused)

    def submit(self, name: str, *options: str) -> "Run":
        """options: of submit, then flags of the configuration."""
        said = self.cli("submit", self.config, "--nodes", "2", *options, "--run.name", name, "--", "--overcommit")
        return Run(self, self.root / name, said.split()[1].rstrip(":"))

    def expected(self) -> list[dict[str, Any]]:
        return records(self.root / "torchrun")


@dataclass(frozen=True)
class Run:
    runs: Runs
    folder: Path
    job: str

    @property
    def log(self) -> Path:
        return self.folder / "slurm" / f"{self.job}.out"

    def reaches(self, is_so: Callable[[], bool], seconds: float = PATIENCE) -> None:
        wait_until(is_so, seconds, self.log)

    def goes_on(self, steps: int = 20) -> int:
        """Returns once it is so many steps further than it was."""
        before = last_logged_step(self.folder)
        self.reaches(lambda: last_logged_step(self.folder) >= before + steps)
        return last_logged_step(self.folder)

    def process(self, rank: int) -> int:
        return int(json.loads((self.folder / f"heartbeats/rank-{rank:05d}.json").read_text())["pid"])

    def story(self) -> list[tuple[str, str]]:
        """(cause, what came next) of each start that has ended."""
        return [(line["cause"], line["next"]) for line in history.read(self.folder) if line["event"] == "end"]

    def ended(self, starts: int) -> None:
        """Returns once so many have."""
        self.reaches(lambda: len(self.story()) >= starts)

    def ends_well(self) -> None:
        self.runs.cluster.wait_for_end(self.job, self.log, PATIENCE)
        assert read_status(self.folder) == {"state": "finished", "step": STEPS}, self.log.read_text()
        assert records(self.folder) == self.runs.expected()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    missing = _missing()
    if missing:
        pytest.skip(f"SLURM IS NOT TESTED: {missing}")
    folder = tmp_path_factory.mktemp("survive")
    home = folder / "cluster"
    variables = {
        "MOE_DIST_CLUSTER": str(home),
        "MOE_DIST_CLUSTER_PORT": str(_free_ports(4)),
        "SLURM_CONF": str(home / "slurm.conf"),
        "MOE_DIST_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # all nodes are this machine
    }
    cluster = Cluster(os.environ | variables)
    (folder / "text.txt").write_text(" ".join(str(number * number) for number in range(4000)))
    config = folder / "a; touch canary $(touch canary).yaml"
    config.write_text(CONFIG.format(folder=folder, steps=STEPS))
    cluster.run(SCRIPT, "start", "3", "--preempt")
    try:
        cluster.run("bash", "launch/torchrun.sh", "2", config, "--run.name", "torchrun")
        yield Runs(cluster, config, folder / "runs")
    finally:
        cluster.run(SCRIPT, "stop")
        assert not home.exists() and not list(folder.rglob("canary")) and not (ROOT / "canary").exists()


def test_a_submitted_run_trains_like_torchrun(runs: Runs) -> None:
    run = runs.submit("plain")
    assert "is in job" in runs.cli("submit", runs.config, "--nodes", "2", "--run.name", "plain", refused=True)
    run.ends_well()
    assert run.story() == [("finished", "stop")]
    assert "has finished its" in runs.cli("submit", runs.config, "--nodes", "2", "--run.name", "plain")
    assert runs.cluster.details(run.job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_run_survives_its_ranks_and_nodes(runs: Runs) -> None:
    """A rank killed, a rank stopped, a node lost: each restarted inside of one job, which has a spare node."""
    run = runs.submit("faults", "--spare-nodes", "1")
    run.goes_on()
    os.kill(run.process(1), signal.SIGKILL)
    run.ended(1)
    run.goes_on()
    os.kill(run.process(0), signal.SIGSTOP)
    run.ended(2)
    run.goes_on()
    last = history.read(run.folder)[-1]
    lost = next(node for node in last["nodes"] if node != "node1")  # the batch script runs on node1
    runs.cluster.run(SCRIPT, "lose", lost)
    run.ended(3)
    run.ends_well()
    runs.cluster.run(SCRIPT, "return", lost)
    assert run.story() == [
        ("rank died", "restart"),
        ("stalled", "restart"),
        ("node lost", "restart"),
        ("finished", "stop"),
    ]
    lines = history.read(run.folder)
    assert {line["job"] for line in lines} == {run.job} and runs.cluster.details(run.job)["Restarts"] == "0"
    nodes = [line["nodes"] for line in lines if line["event"] == "start"]
    assert lost in nodes[2] and lost not in nodes[3]
    ratio = effective_ratio(run.folder, lines)
    assert ratio is not None and 0 < ratio < 1


@pytest.mark.slow
def test_a_run_without_spare_nodes_is_queued_again_when_one_is_lost(runs: Runs) -> None:
    run = runs.submit("requeued")
    run.goes_on()
    nodes = history.read(run.folder)[-1]["nodes"]
    runs.cluster.run(SCRIPT, "lose", nodes[1])
    run.ended(1)
    run.reaches(lambda: history.starts(history.read(run.folder)) == 2)
    assert nodes[1] not in history.read(run.folder)[-1]["nodes"]
    run.ends_well()
    runs.cluster.run(SCRIPT, "return", nodes[1])
    assert run.story() == [("node lost", "requeue"), ("finished", "stop")]


@pytest.mark.slow
def test_a_job_that_loses_the_node_of_its_script_is_queued_again(runs: Runs) -> None:
    run = runs.submit("headless", "--spare-nodes", "1")
    run.goes_on()
    head = history.read(run.folder)[-1]["nodes"][0]
    runs.cluster.run(SCRIPT, "lose", head)
    wait_until(lambda: runs.cluster.details(run.job)["Restarts"] == "1", PATIENCE, run.log)
    runs.cluster.run(SCRIPT, "return", head)
    run.ends_well()
    assert run.story() == [("node lost", "requeue"), ("finished", "stop")]


@pytest.mark.slow
def test_a_run_gives_way_and_comes_back_as_often_as_it_must(runs: Runs) -> None:
    """Preempted five times by a partition of higher priority, with time to save each time."""
    run = runs.submit("preempted")
    urgent = ("--partition=urgent", "--nodes=3", "--overcommit", "--ntasks-per-node=1", "--output=/dev/null")
    for preempted in range(1, 6):
        run.goes_on(10)
        runs.cluster.run("sbatch", *urgent, "--wrap", "sleep 1")
        run.ended(preempted)
    run.ends_well()
    assert run.story() == [("preempted", "requeue")] * 5 + [("finished", "stop")]
    assert runs.cluster.details(run.job)["Restarts"] == "5"


@pytest.mark.slow
def test_a_cancelled_run_has_saved_and_goes_on_when_handed_in_again(runs: Runs) -> None:
    run = runs.submit("cancelled")
    run.goes_on()
    assert f"job {run.job} has ended" in runs.cli("cancel", run.folder)
    assert read_status(run.folder)["state"] == "preempted" and run.story() == [("signal", "requeue")]
    assert runs.cluster.run("squeue", "--noheader", f"--jobs={run.job}") == ""
    again = runs.submit("cancelled")
    again.goes_on()
    runs.cluster.run("scancel", again.job)  # by hand: the ranks save in the seconds that Slurm leaves them
    again.ended(2)
    assert again.story()[1] == ("cancelled", "stop") and read_status(run.folder)["state"] == "preempted"
    runs.submit("cancelled").ends_well()
