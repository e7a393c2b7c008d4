"""What Slurm's variables say, by hand; tests/slurm compares with Slurm itself."""

import socket
import subprocess
from typing import Any

import pytest

from moe_dist.parallel.slurm import address_of, hosts, leave_step, step_from_environment, step_port, tasks_of_nodes

STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}


def test_tasks_of_nodes() -> None:
    assert list(tasks_of_nodes("2,1")) == [2, 1]
    assert list(tasks_of_nodes("2(x3)")) == [2, 2, 2]
    assert list(tasks_of_nodes("16(x2),3,1(x2)")) == [16, 16, 3, 1, 1]
    with pytest.raises(ValueError, match=r"2\(3\)"):
        list(tasks_of_nodes("2(3)"))


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]),
        ("a.b-c,d[1]", ["a.b-c", "d1"]),
    ],
)
def test_hosts(nodelist: str, names: list[str]) -> None:
    assert list(hosts(nodelist)) == names


@pytest.mark.parametrize("nodelist", ["node[1-", "node]1", ",a", "a,,b", "node[x]", "(null)[", ""])
def test_no_list_of_nodes(nodelist: str) -> None:
    with pytest.raises(ValueError, match="is no list of nodes: set MASTER_ADDR"):
        list(hosts(nodelist))


def test_a_task_of_uneven_nodes() -> None:
    step = step_from_environment(STEP)
    assert (step.rank, step.world, step.local, step.tasks_of_nodes) == (3, 5, 1, (2, 2, 1))
    assert (step.first_node, step.name) == ("gpu08", "Slurm step 70123.2")
    assert step_from_environment(STEP | {"SLURM_RESTART_COUNT": "1"}).name == "Slurm step 70123.2, start 2"


def test_ranks_are_numbered_node_by_node() -> None:
    """`srun -N2 -n4 --distribution=cyclic` gives node 0 the tasks 0 and 2."""
    cyclic = {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    places = [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")]
    ranks = [
        step_from_environment(STEP | cyclic | {"SLURM_PROCID": task, "SLURM_NODEID": node, "SLURM_LOCALID": local}).rank
        for task, node, local in places
    ]
    assert ranks == [0, 2, 1, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"SLURM_STEP_NUM_TASKS": "4"}, {"SLURM_STEP_NUM_NODES": "2"}, {"SLURM_NODEID": "3"}, {"SLURM_LOCALID": "2"}],
)
def test_variables_that_contradict(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="variables of two steps are mixed"):
        step_from_environment(STEP | wrong)


def test_steps_of_neighbouring_jobs_have_ports_of_their_own() -> None:
    assert (step_port(70123, 0), step_port(70123, 1)) == (25968, 25969)  # 20000 + 70123 * 16 % 12000
    ports = [step_port(job, step) for job in range(70000, 70700) for step in range(16)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20000 and max(ports) < 32000


def test_the_address_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the network knows is asked of nobody; else Slurm's NodeAddr, and if that is unknown too, an error."""
    known, asked = {"node1", "10.0.0.7"}, []

    def getaddrinfo(host: str, port: object) -> list[object]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [host]

    def run(command: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(list(command))
        said = {"gpu08": "10.0.0.7", "gpu09": "gpu09"}[command[-1]]
        return subprocess.CompletedProcess(
            command, 0, f"NodeName={command[-1]} Arch=x86_64\n   NodeAddr={said} NodeHostName=x\n"
        )

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(subprocess, "run", run)
    assert address_of("node1") == "node1" and not asked
    assert address_of("gpu08") == "10.0.0.7" and asked == [["scontrol", "show", "node", "gpu08"]]
    with pytest.raises(ValueError, match="no host gpu09, and its NodeAddr gpu09 leads nowhere: set MASTER_ADDR"):
        address_of("gpu09")


def test_no_address_and_no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no host no-such-host.invalid, and scontrol cannot be started"):
        address_of("no-such-host.invalid")


def test_a_program_of_its_own_in_a_step() -> None:
    left = leave_step(STEP | {"PATH": "/bin"})
    assert "SLURM_STEP_NUM_TASKS" not in left and "SLURM_PROCID" not in left
    assert left["PATH"] == "/bin" and left["SLURM_JOB_ID"] == "70123"
