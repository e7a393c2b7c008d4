"""Ranks on several hosts, which meet over slow cables: slurm/local_network.sh, and what moe_dist does on it."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from moe_dist.chaos.judge import records
from moe_dist.chaos.ranks import Ranks
from moe_dist.config import MoEConfig
from moe_dist.kernels.top_k.reference import top_k_experts
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, Routing
from moe_dist.moe.dispatch import make_dispatcher
from moe_dist.parallel.collectives import all_reduce, exchange_rows
from moe_dist.parallel.mesh import create_mesh
from moe_dist.step import Site, StepContext
from tests.dist.helpers import KEY, TINY, assert_same, run_checks
from tests.dist.nodes import ROOT, Network
from tests.dist.programs import forked_ranks
from tests.dist.test_moe import CASES, T, part_of, unchanged

WIDTH, EXPERTS, TOKENS = 256, 8, 256  # of each rank, so that rows outweigh what else is said on the cable
RATE = 200e6  # bits a second, of the fixture


def sent_here() -> int:
    """Bytes that this node has sent over its cable, headers included, as the kernel counts them."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    return int(line.split()[9])


def check_who_sits_where() -> None:
    rank = dist.get_rank()
    assert socket.gethostname() == f"node{rank // 2 + 1}"
    mesh = create_mesh(4, 1)
    assert (os.environ["LOCAL_WORLD_SIZE"], mesh.layout.node_size) == ("2", 2)
    assert mesh.ep_node.ranks == ((0, 1), (2, 3))[rank // 2] and mesh.ep_across.ranks == ((0, 2), (1, 3))[rank % 2]


def check_two_steps_are_one() -> None:
    """Hierarchical dispatch gives what all_to_all gives, to the last bit."""
    mesh = create_mesh(4, 1)
    own = part_of(mesh.rank, (T // 4,) * 4)
    for case in CASES:
        for wire_dtype in ("same", "bf16"):
            two, _ = case.run(mesh, replace(case.moe, dispatch="hierarchical", wire_dtype=wire_dtype), own)
            one, _ = case.run(mesh, replace(case.moe, dispatch="all_to_all", wire_dtype=wire_dtype), own)
            assert torch.equal(two.y_TD, one.y_TD) and torch.equal(two.grad_x_TD, one.grad_x_TD), case
            assert_same(two.grads, one.grads)
            assert two.kept == one.kept


def check_each_row_crosses_once_each_way() -> None:
    """The cable carries the rows for experts of the other node, and their results: in one step and in two."""
    mesh = create_mesh(4, 1)
    rows_TD = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(mesh.rank))
    stats = top_k_experts(rows_TD[:, :EXPERTS], 2)
    routing = Routing(stats.experts_TK, stats.scores_TK, rows_TD[:, :EXPERTS], None, stats)
    moe = MoEConfig(num_experts=EXPERTS, capacity_factor=None)
    choice = Choice(routing, Capacity(moe, Site(0), mesh.token_ranks)(routing, StepContext(KEY)), stats.scores_TK)
    away = (stats.experts_TK // (EXPERTS // 2) != mesh.rank // 2).sum()  # each node holds half of the experts
    rows_N = torch.zeros(2, dtype=torch.int64)
    rows_N[mesh.rank // 2] = away
    there_and_back = int(all_reduce(rows_N, mesh.world).sum())  # out of either node go its rows, and others' results
    for dispatch in ("all_to_all", "hierarchical"):
        dispatcher = make_dispatcher(replace(moe, dispatch=dispatch), mesh)
        dist.barrier()
        before = sent_here()
        dist.barrier()
        dispatcher.carry(rows_TD, choice, unchanged)
        dist.barrier()
        ratio = (sent_here() - before) / (there_and_back * WIDTH * 4)
        assert 1 < ratio < 1.1, f"{dispatch}: {ratio}"


def check_cables_are_slow() -> None:
    mesh = create_mesh(2, 1)
    rows = torch.zeros(2000, 500)  # 4 MB each way
    counts = [[0, 2000], [2000, 0]][mesh.rank]
    dist.barrier()
    began = time.perf_counter()
    exchange_rows(rows, counts, counts, mesh.ep)
    dist.barrier()
    seconds, least = time.perf_counter() - began, rows.nbytes * 8 / RATE
    assert seconds > 0.95 * least, (seconds, least)


def test_ranks_on_two_nodes(network: Network) -> None:
    run_checks(
        4, [check_who_sits_where, check_two_steps_are_one, check_each_row_crosses_once_each_way], network=network
    )
    run_checks(2, [check_cables_are_slow], network=network)


def test_a_network_leaves_nothing_behind(network: Network, tmp_path: Path) -> None:
    """Beside another one, whatever runs on it, and after a start that died half-way."""
    folder = tmp_path / "other"
    with Network(folder, nodes=1, rate="none") as other:
        assert other.do("run", "node1", "hostname") == "node1"
        assert other.do("address", "node1") != network.do("address", "node1")
        space = other.do("space", "node1")
        assert "already running" in other.do("start", "1", refused=True)
        (folder / "rate").unlink()  # what is written last
        other.do("start", "1", "--rate", "1mbit")
        assert other.do("status") == f"node1 {other.do('address', 'node1')} cable up, rate 1mbit"
        left = subprocess.Popen(other.command("run", "node1", "sleep", "1000"))
        while other.do("processes", "node1") == "":
            time.sleep(0.05)
    assert left.wait(10) == -9
    assert not folder.exists() and not list(Path("/etc/netns").glob(f"{space.removesuffix('node1')}*"))
    for what in ("netns", "link"):
        said = subprocess.run(["ip", "-o", what], capture_output=True, text=True, check=True).stdout
        assert space[:-6].removeprefix("moe_dist-") not in said
    assert network.do("run", "node2", "hostname") == "node2"  # the other one lives


def test_a_network_refuses(network: Network, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters").touch()
    for where, words, complaint in (
        (tmp_path / "a", ("start", "0"), "start 0: say how many nodes, 1 to 99"),
        (tmp_path / "a", ("start", "2", "--rate", "1g; touch b"), "rate 1g; touch b: say a number and kbit"),
        (tmp_path / "a", ("run", "node1", "true"), "no network in"),
        (tmp_path / "mine", ("start", "2"), "mine"),
        (network.folder, ("run", "node3", "true"), "no node3 in"),
        (network.folder, ("cable", "node1", "out"), "cable node1 out: say up or down"),
        (network.folder, ("restart",), "usage"),
    ):
        assert complaint in Network(where, 2, "none").do(*words, refused=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letters"]


@pytest.mark.slow
def test_torchrun_on_two_hosts_trains_as_on_one(network: Network, tmp_path: Path) -> None:
    """Where nothing but MASTER_ADDR says where others are, by name; each host finds its own interface."""
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(2000)))
    config: dict[str, Any] = {
        "model": TINY["model"],
        "data": {"kind": "text", "paths": ["text.txt"]},
        "parallel": {"ep": 2},
        "optim": {"warmup_steps": 0},
        "train": TINY["train"] | {"steps": 6, "threads": 1},
        "run": {"save_every": 100, "eval_sequences": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    log, train = tmp_path / "log", ["train", str(tmp_path / "tiny.yaml"), "--run.name"]
    with pytest.MonkeyPatch.context() as patch, forked_ranks():
        patch.chdir(tmp_path)
        with Ranks(["moe_dist.cli", *train, "here"], 2, log) as ranks:
            assert [end.code for end in ranks.wait(100, lambda: 20.0)] == [0, 0], log.read_text()
    command = [str(ROOT / "launch/torchrun.sh"), "1", *train[1:], "hosts"]
    clean = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    clean |= {"PYTHONPATH": str(ROOT), "MOE_DIST_PYTHON": sys.executable, "NNODES": "2", "MASTER_ADDR": "node1"}
    with log.open("wb") as printed:
        hosts = [
            subprocess.Popen(
                network.command("run", node, *command),
                cwd=tmp_path,
                env=clean | {"NODE_RANK": str(number)},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
            for number, node in enumerate(network.nodes)
        ]
        assert [host.wait(200) for host in hosts] == [0, 0], log.read_text()
    assert records(tmp_path / "runs/hosts") == records(tmp_path / "runs/here")
    assert len(records(tmp_path / "runs/hosts")) == 6
