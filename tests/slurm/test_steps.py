"""Nodes are named as Slurm itself names them."""

import pytest

from moe_dist.parallel.slurm import hosts
from tests.slurm.conftest import Cluster

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("nodelist", ["node[1-2]", "gpu[08-10,12],login", "n[099-101]", "rack[1-2]n[3-4],x"])
def test_nodes_are_named_as_slurm_names_them(cluster: Cluster, nodelist: str) -> None:
    assert list(hosts(nodelist)) == cluster.run("scontrol", "show", "hostnames", nodelist).split()
