"""Which rank this is, from what a launcher leaves in the environment."""

import pytest

from moe_dist.parallel.launch import Rank, rank_from_environment

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
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "MASTER_ADDR": "node1",
}


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
    # the port is 20000 + 70123 % 20000
    assert rank_from_environment(SLURM) == Rank(6, 8, 2, 4, ("node1", 30123))
    assert rank_from_environment(SLURM | {"MASTER_PORT": "1234"}).address == ("node1", 1234)


def test_torchrun_inside_slurm_wins() -> None:
    assert rank_from_environment(SLURM | TORCHRUN) == rank_from_environment(TORCHRUN)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_with_a_variable_missing(name: str) -> None:
    with pytest.raises(ValueError, match=f"the launcher set no {name}"):
        rank_from_environment(without(TORCHRUN, name))


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_PROCID", "SLURM_LOCALID"])
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
