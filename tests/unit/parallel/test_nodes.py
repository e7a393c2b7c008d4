"""Which of several machines a launcher is, and where they meet."""

import os
from argparse import Namespace

import pytest

from moe_dist.parallel import nodes as of_nodes
from moe_dist.parallel.nodes import launch, node_from_environment
from moe_dist.parallel.torchrun import main
from tests.unit.parallel.test_slurm import STEP

BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "host1"}
COMMAND = ["moe_dist.cli", "train", "configs/tiny.yaml"]
ONE_A_NODE = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_LOCALID": "0"}


def test_by_hand() -> None:
    node = node_from_environment(BY_HAND, 2, COMMAND)
    assert (node.member.number, node.member.total, node.host, node.port) == (1, 2, "host1", 29500)
    assert node_from_environment(BY_HAND | {"MASTER_PORT": "20001"}, 2, COMMAND).port == 20001


def test_other_commands_are_other_starts() -> None:
    ours = node_from_environment(BY_HAND, 2, COMMAND)
    theirs = node_from_environment(BY_HAND, 2, [*COMMAND, "--train.steps=3"])
    long = node_from_environment(BY_HAND, 2, [*COMMAND, "x" * 300])
    assert ours.member.start == "moe_dist.cli train configs/tiny.yaml"
    assert len({node.run_id for node in (ours, theirs, long)}) == 3
    assert "/" not in ours.run_id and len(long.run_id) < 120  # torchrun names a folder by it


def test_a_slurm_step_says_it_all() -> None:
    node = node_from_environment(STEP | ONE_A_NODE | {"MASTER_ADDR": "host1"}, 3, COMMAND)
    assert (node.member.number, node.member.start, node.port) == (1, "Slurm step 70123.2", 25970)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MASTER_ADDR": "host1"}, "set NODE_RANK: which of the NNODES=2 machines is this, from 0"),
        ({"NODE_RANK": "0"}, "set MASTER_ADDR: an address of the machine with NODE_RANK=0"),
        (BY_HAND | {"NODE_RANK": "2"}, "NODE_RANK=2 is not below NNODES=2"),
        (BY_HAND | {"NODE_RANK": "one"}, "NODE_RANK='one' is no number"),
        (BY_HAND | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_what_is_missing_or_wrong(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        node_from_environment(environ, 2, COMMAND)


@pytest.mark.parametrize(
    ("nodes", "environ", "said"),
    [
        ("two", {}, "NNODES=two is no number of machines"),
        ("0", {}, "NNODES=0 is no number of machines"),
        ("2", {"NODE_RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}, "finds no host 'no-such-host.invalid'"),
        ("1", STEP, "each of the 5 tasks of this Slurm step starts a torchrun, but NNODES=1"),
        ("3", STEP, "each of the 5 tasks of this Slurm step starts a torchrun, but NNODES=3"),
    ],
)
def test_mistakes_are_one_line(
    nodes: str,
    environ: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # to be put back
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["--nnodes", nodes, "--nproc_per_node", "2", "-m", *COMMAND]) == 2
    printed = capfd.readouterr().err
    assert said in printed and printed.startswith("moe-dist: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("environ", "threads"),
    [({}, "4"), ({"SLURM_CPUS_PER_TASK": "6"}, "3"), ({"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "6"}, "5")],
)
def test_ranks_divide_what_the_launcher_may_use(
    environ: dict[str, str], threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun alone would give each one thread."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # to be put back
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    started: list[Namespace] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(of_nodes, "_run", started.append)
    launch(["--nproc_per_node", "2", "-m", *COMMAND])
    assert len(started) == 1 and os.environ["OMP_NUM_THREADS"] == threads
