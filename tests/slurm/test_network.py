"""Two nodes of a real Slurm that reach each other over slow cables only: ranks meet, and train as on one machine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.chaos.judge import records
from tests.dist.nodes import Network
from tests.slurm.conftest import SCRIPT, Cluster, wait_until

pytestmark = pytest.mark.timeout(300)
CONFIG = """
model: {{d_model: 32, num_layers: 2, num_heads: 4, d_ff: 48, moe: {{num_experts: 4, capacity_factor: 1.0}}}}
data: {{kind: text, paths: [{folder}/text.txt]}}
parallel: {{ep: 2}}
optim: {{lr: 1.0e-3, warmup_steps: 0, schedule: constant}}
train: {{steps: 20, seq_len: 16, global_batch: 8, accumulation: 1, threads: 1}}
run: {{root: {folder}/runs, eval_sequences: 16, save_every: 1000}}
"""


def on_both_nodes(*command: str | Path) -> list[str | Path]:
    return ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, "-m", *command]


def test_tasks_meet_at_their_own_addresses(slow_cluster: Cluster, network: Network, tmp_path: Path) -> None:
    """A node has no interface but its loopback and the one with that address."""
    slow_cluster.run(*on_both_nodes("tests.slurm.ranks", tmp_path))
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"0-{rank}").read_text()) for rank in range(2)]
    assert [(told["host"], told["met_at"], told["met"]) for told in found] == [
        ("node1", "node1", [0, 1]),
        ("node2", "node1", [0, 1]),
    ]
    addresses = slow_cluster.run("sinfo", "--noheader", "--Node", "--format=%o").split()
    assert len(set(addresses)) == 2 and network.do("address", "node1") not in addresses
    interfaces = slow_cluster.run("srun", "--nodelist=node2", "ip", "-4", "-brief", "address").split()
    assert [word for word in interfaces if "/" in word] == ["127.0.0.1/8", f"{addresses[1]}/24"]


@pytest.mark.slow
def test_losses_are_those_of_one_machine(slow_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(4000)))
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    slow_cluster.run("bash", "launch/torchrun.sh", "2", config, "--run.name", "here")
    slow_cluster.run(*on_both_nodes("moe_dist.cli", "train", config, "--run.name", "nodes"))
    assert records(tmp_path / "runs/nodes") == records(tmp_path / "runs/here")
    assert len(records(tmp_path / "runs/nodes")) == 20


def test_a_node_is_lost_and_returns(slow_cluster: Cluster) -> None:
    """All that runs on it ends at once, and nothing elsewhere."""
    slow_cluster.run("sbatch", "--nodes=2", "--ntasks=2", "--output=/dev/null", "--wrap", "srun sleep 1000")
    network = Network(Path(slow_cluster.env["MOE_DIST_CLUSTER"]) / "network", nodes=2, rate="none")
    # Its slurmd, the keeper of the step, and sleep.
    wait_until(lambda: network.do("processes", "node2").count("\n") == 2, 60, Path("/dev/null"))
    slow_cluster.run(SCRIPT, "lose", "node2")
    assert network.do("processes", "node2") == ""
    assert network.do("processes", "node1").count("\n") >= 2
    slow_cluster.run(SCRIPT, "return", "node2")
    slow_cluster.run("scancel", "--user=root")
    assert slow_cluster.run("srun", "--nodelist=node2", "hostname") == "node2"
