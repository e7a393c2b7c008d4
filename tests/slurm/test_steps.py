"""Ranks as tasks of a Slurm step, without torchrun, and steps and nodes as Slurm itself names them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.parallel.slurm import hosts
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("nodelist", ["node[1-2]", "gpu[08-10,12],login", "n[099-101]", "rack[1-2]n[3-4],x"])
def test_nodes_are_named_as_slurm_names_them(cluster: Cluster, nodelist: str) -> None:
    assert list(hosts(nodelist)) == cluster.run("scontrol", "show", "hostnames", nodelist).split()


def test_two_steps_of_a_job_on_uneven_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Three tasks on two nodes whose names the network does not know, twice at once: each rank meets its own step."""
    program = f"{sys.executable} -m tests.slurm.ranks {tmp_path}"
    step = f"srun --overlap --overcommit --nodes=2 --ntasks=3 --kill-on-bad-exit=1 {program}"
    cluster.run(
        "salloc", "--nodes=2", "--ntasks=4", "--overcommit", "bash", "-c", f"{step} & first=$!; {step}; wait $first"
    )
    for number in range(2):
        found: list[dict[str, Any]] = [json.loads((tmp_path / f"{number}-{rank}").read_text()) for rank in range(3)]
        assert [told["local"] for told in found] == [[0, 2], [1, 2], [0, 1]]
        assert [told["node"] for told in found] == ["node1", "node1", "node2"]
        assert [told["met"] for told in found] == [[10 * number + rank for rank in range(3)]] * 3
        assert [told["ep_node"] for told in found] == [[0], [1], [2]]  # equal on all nodes, and never across one's end
