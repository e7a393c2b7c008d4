"""Which rank this is, from what a launcher leaves in the environment, and what it takes of its machine."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.parallel.launch import Rank, rank_from_environment, start
from moe_dist.parallel.share import Place, cpus_of_task, gpu_of_rank, neighbours, refuse_shared_gpus, threads_of_rank

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "2",
    "MASTER_ADDR": "node1",
}

OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `start` sets; a test that calls it sets them before, so that they are put back."""


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


def test_alone() -> None:
    assert rank_from_environment({}) == Rank(rank=0, world=1, local_rank=0, local_world=1, address=None, file=None)
    assert rank_from_environment({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}) == Rank()
    assert rank_from_environment({"SLURM_JOB_ID": "1"}) == Rank()  # in an allocation, outside a step


def test_torchrun() -> None:
    assert rank_from_environment(TORCHRUN) == Rank(5, 8, 1, 4, ("node1", 29400))
    assert rank_from_environment(without(TORCHRUN, "LOCAL_WORLD_SIZE")).local_world == 1


def test_slurm() -> None:
    # the port is 20000 + 70123 * 16 % 12000
    assert rank_from_environment(SLURM) == Rank(6, 8, 2, 4, ("node1", 25968), start="Slurm step 70123.0")
    assert rank_from_environment(SLURM | {"MASTER_PORT": "1234"}).address == ("node1", 1234)


def test_two_steps_of_a_job_differ() -> None:
    first, second = rank_from_environment(SLURM), rank_from_environment(SLURM | {"SLURM_STEP_ID": "1"})
    assert first.address != second.address and first.start != second.start


def test_slurm_on_one_node_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_STEP_NODELIST": "no-such-host.invalid"}
    here = without(SLURM, "MASTER_ADDR") | one | {"SLURM_NODEID": "0", "SLURM_LOCALID": "6"}
    rank = rank_from_environment(here)
    assert (rank.rank, rank.local_world, rank.on_one_machine) == (6, 8, True)


def test_torchrun_inside_slurm_wins() -> None:
    assert rank_from_environment(SLURM | TORCHRUN) == rank_from_environment(TORCHRUN)
    nodes = SLURM | TORCHRUN | {"GROUP_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}
    assert rank_from_environment(nodes).rank == 5


def test_a_torchrun_in_each_task_is_refused() -> None:
    with pytest.raises(
        ValueError, match="each of the 8 tasks of this Slurm step starts a torchrun, but NNODES=1: start"
    ):
        rank_from_environment(SLURM | TORCHRUN | {"GROUP_WORLD_SIZE": "1"})


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_with_a_variable_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"the launcher set no {name}"):
        rank_from_environment(without(TORCHRUN, name))


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "SLURM_NODEID", "SLURM_LOCALID"]
)
def test_slurm_with_a_variable_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"the launcher set no {name}"):
        rank_from_environment(without(SLURM, name))


def test_slurm_without_any_address() -> None:
    with pytest.raises(ValueError, match="the launcher set no SLURM_STEP_NODELIST"):
        rank_from_environment(without(without(SLURM, "MASTER_ADDR"), "SLURM_STEP_NODELIST"))


@pytest.mark.parametrize("environ", [TORCHRUN | {"RANK": "first"}, SLURM | {"SLURM_STEP_NUM_TASKS": "8(x2)"}])
def test_a_variable_that_is_no_number(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is no number"):
        rank_from_environment(environ)


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_is_none(port: str) -> None:
    for environ in (TORCHRUN, SLURM):
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} is no port"):
            rank_from_environment(environ | {"MASTER_PORT": port})


def test_which_gpu() -> None:
    """All of the machine are visible under torchrun; under Slurm perhaps this task's own alone, as number 0."""
    assert [gpu_of_rank(local_rank, visible=8) for local_rank in range(8)] == list(range(8))
    assert [gpu_of_rank(local_rank, visible=1) for local_rank in range(8)] == [0] * 8
    with pytest.raises(ValueError, match="local rank 2 needs a GPU of its own, but 2 are visible"):
        gpu_of_rank(2, visible=2)


def place(*cpus: int, machine: str = "a", gpu: str | None = None, local_world: int = 1) -> Place:
    return Place(machine, f"host-{machine}", cpus, local_world, gpu)


def test_ranks_with_one_gpu_are_refused() -> None:
    refuse_shared_gpus([place(gpu="GPU-1"), place(gpu="GPU-2"), place(), place()])
    with pytest.raises(ValueError, match="ranks 1 and 2 have the same GPU, GPU-2 of host-b"):
        refuse_shared_gpus([place(gpu="GPU-1"), place(gpu="GPU-2", machine="b"), place(gpu="GPU-2", machine="b")])


def test_threads_are_divided_among_those_who_share_cpus() -> None:
    shared = [place(*range(8))] * 4
    bound = [place(2 * rank, 2 * rank + 1) for rank in range(4)]
    two_machines = [place(*range(8))] * 2 + [place(*range(8), machine="b")] * 2
    assert [threads_of_rank(None, {}, rank, shared) for rank in range(4)] == [2] * 4
    assert [threads_of_rank(None, {}, rank, bound) for rank in range(4)] == [2] * 4
    assert [threads_of_rank(None, {}, rank, two_machines) for rank in range(4)] == [4] * 4
    assert threads_of_rank(None, {}, 0, [place(0), place(0), place(0)]) == 1


def test_threads_as_they_are_asked_for() -> None:
    ranks = [place(*range(8))] * 2
    assert threads_of_rank(3, {"OMP_NUM_THREADS": "5"}, 0, ranks) == 3
    assert threads_of_rank(None, {"OMP_NUM_THREADS": "5"}, 0, ranks) == 5
    assert threads_of_rank(None, {"OMP_NUM_THREADS": "5,2"}, 0, ranks) == 5  # of nested regions
    with pytest.raises(ValueError, match="OMP_NUM_THREADS='many' is no number"):
        threads_of_rank(None, {"OMP_NUM_THREADS": "many"}, 0, ranks)


def test_a_slurm_task_that_is_bound_to_no_cpus_keeps_to_its_own_number() -> None:
    assert cpus_of_task({}, 8) == 8
    assert cpus_of_task({"SLURM_CPUS_PER_TASK": "2"}, 8) == 2
    assert threads_of_rank(None, {"SLURM_CPUS_PER_TASK": "2"}, 0, [place(*range(8))]) == 2
    assert threads_of_rank(None, {"SLURM_CPUS_PER_TASK": "6"}, 0, [place(*range(8))] * 2) == 4


def test_neighbours_share_a_node_everywhere() -> None:
    """Nodes of 4, 2 and 2 ranks: in pairs, no node ends within a group."""
    assert neighbours([place(local_world=size) for size in (4, 4, 4, 4, 2, 2, 2, 2)]) == 2
    assert neighbours([place(local_world=size) for size in (2, 2, 1)]) == 1
    assert neighbours([place(local_world=size) for size in (3, 3, 3, 2, 2)]) == 1  # though all have 2
    assert neighbours([place(local_world=4)] * 8) == 4


@pytest.mark.parametrize(("visible", "gpu"), [(1, 0), (4, 3)])
def test_libraries_are_told_the_gpu_and_the_ranks(visible: int, gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes LOCAL_RANK for the number of the GPU, and hierarchical dispatch LOCAL_WORLD_SIZE for a node."""
    for name in OF_A_RANK:
        monkeypatch.setenv(name, "9")
    join, taken = dist.init_process_group, []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))

    def without_nccl(backend: str, **arguments: Any) -> None:
        assert backend == "cpu:gloo,cuda:nccl"
        join("gloo", **arguments)

    monkeypatch.setattr(dist, "init_process_group", without_nccl)
    try:
        device = start(Rank(local_rank=3), "cuda", threads=1)
    finally:
        dist.destroy_process_group()
    assert device == torch.device("cuda", gpu) and taken == [device]
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(gpu), "LOCAL_WORLD_SIZE": "1"}
    assert {name: os.environ[name] for name in OF_A_RANK} == told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_deterministic_runs_refuse_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run after them in the same process does not: the setting is what was asked for last."""
    for name in (*OF_A_RANK, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "lo" if name == "GLOO_SOCKET_IFNAME" else "9")
    try:
        for deterministic in (True, False):
            start(Rank(), "cpu", 1, deterministic)
            dist.destroy_process_group()
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            # One of the operations that torch knows to depend on the order of threads, also on CPU.
            values, index = torch.zeros(2), torch.zeros(1, dtype=torch.long)
            if deterministic:
                with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                    values.put_(index, torch.ones(1))
            else:
                values.put_(index, torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
