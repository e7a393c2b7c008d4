"""What Slurm says of a process: which task of which step it is, read from the variables that srun sets for it.

    $ srun -N2 -n3 moe-dist train ...    SLURM_STEP_TASKS_PER_NODE=2,1    ranks 0 and 1 on one node, 2 on the other

Ranks are numbered node by node, whatever srun's --distribution says, so that neighbours share a node.
"""

import itertools
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_PORTS = range(20000, 32000)  # below the range that Linux takes for outgoing connections
_STEPS = 16  # steps of one job that are sure to have ports of their own
_PATIENCE = 60.0  # seconds for an answer of Slurm

OF_A_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID")


@dataclass(frozen=True)
class Step:
    """A Slurm step of several tasks, as one of them sees it. name: as in `squeue --steps`. node, local: which node of
    the step this task is on, and which of its tasks it is, from 0. first_node: the name of node 0 in Slurm."""

    name: str
    tasks_of_nodes: tuple[int, ...]
    node: int
    local: int
    first_node: str
    port: int

    @property
    def rank(self) -> int:
        """Tasks on earlier nodes, and those before this one on its own."""
        return sum(self.tasks_of_nodes[: self.node]) + self.local

    @property
    def world(self) -> int:
        return sum(self.tasks_of_nodes)


def tasks_of_step(environ: Mapping[str, str]) -> int:
    """1 outside a step. Raises ValueError when it is no number."""
    return Variables(environ).number("SLURM_STEP_NUM_TASKS") if environ.get("SLURM_STEP_NUM_TASKS") else 1


def step_from_environment(environ: Mapping[str, str]) -> Step:
    """Raises ValueError when a variable is missing, or says what does not fit the others."""
    slurm = Variables(environ)
    job, number = slurm.number("SLURM_JOB_ID"), slurm.number("SLURM_STEP_ID")
    tasks = tuple(tasks_of_nodes(slurm.text("SLURM_STEP_TASKS_PER_NODE")))
    node, local = slurm.number("SLURM_NODEID"), slurm.number("SLURM_LOCALID")
    expected = slurm.number("SLURM_STEP_NUM_NODES"), slurm.number("SLURM_STEP_NUM_TASKS")
    if (len(tasks), sum(tasks)) != expected or node >= len(tasks) or local >= tasks[node]:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} does not fit {expected[1]} tasks on "
            f"{expected[0]} nodes with this one the task {local} of node {node}: variables of two steps are mixed"
        )
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return Step(
        name=f"Slurm step {job}.{number}" + (f", start {int(restarts) + 1}" if restarts != "0" else ""),
        tasks_of_nodes=tasks,
        node=node,
        local=local,
        first_node=next(hosts(slurm.text("SLURM_STEP_NODELIST"))),
        port=step_port(job, number),
    )


def refuse_other_tasks(environ: Mapping[str, str], nodes: int) -> None:
    """For a torchrun that knows of `nodes` nodes. Raises ValueError where the tasks of a Slurm step are not one for
    each: those that are too many would train side by side, and when one ends, srun ends the others."""
    tasks = tasks_of_step(environ)
    if tasks not in (1, nodes):
        raise ValueError(
            f"each of the {tasks} tasks of this Slurm step starts a torchrun, but NNODES={nodes}: start one task a "
            f"node (srun --nodes={nodes} --ntasks={nodes}), or leave torchrun out (srun moe-dist train ...); for runs "
            "that are to be separate, unset SLURM_STEP_NUM_TASKS"
        )


class Variables:
    """Those that a launcher sets. Raises ValueError for one that is missing or wrong."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, name: str) -> str:
        if not self.environ.get(name):
            raise ValueError(f"the launcher set no {name}: start with torchrun, or as a Slurm step")
        return self.environ[name]

    def number(self, name: str) -> int:
        if not (self.text(name).isascii() and self.text(name).isdigit()):
            raise ValueError(f"{name}={self.environ[name]!r} is no number: start with torchrun, or as a Slurm step")
        return int(self.environ[name])

    def port(self, name: str) -> int:
        if not 0 < self.number(name) < 2**16:
            raise ValueError(f"{name}={self.environ[name]} is no port: choose one from 1 to 65535")
        return self.number(name)


def step_port(job: int, step: int) -> int:
    """The port where the ranks of a step meet. Every rank computes it, so it may be taken: by another job whose number
    ends alike, or by another program.

    (job 70123, step 0) -> 20000 + 70123 * 16 % 12000 = 25968; its step 1 -> 25969
    """
    return _PORTS[(job * _STEPS + step) % len(_PORTS)]


def tasks_of_nodes(text: str) -> Iterator[int]:
    """'2(x3),1' -> 2, 2, 2, 1. Raises ValueError for anything else."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is no list like 2(x3),1")
        yield from itertools.repeat(int(match[1]), int(match[2] or 1))


def hosts(nodelist: str) -> Iterator[str]:
    """'gpu[08-10,12],login' -> gpu08, gpu09, gpu10, gpu12, login, as `scontrol show hostnames` (which containers often
    lack) gives them. Raises ValueError when that is no list of nodes."""
    part = r"(?:[^\[\],]|\[\d[\d,-]*\])+"
    if not re.fullmatch(rf"{part}(?:,{part})*", nodelist):
        raise ValueError(f"SLURM_STEP_NODELIST={nodelist!r} is no list of nodes: set MASTER_ADDR")
    for pattern in re.findall(part, nodelist):
        pieces = re.split(r"\[([\d,-]+)\]", pattern)  # text and ranges, in turn
        choices = [list(_numbers(piece)) if place % 2 else [piece] for place, piece in enumerate(pieces)]
        yield from map("".join, itertools.product(*choices))


def _numbers(ranges: str) -> Iterator[str]:
    """'08-10,12' -> 08, 09, 10, 12."""
    for low, _, high in (part.partition("-") for part in ranges.split(",")):
        for number in range(int(low), int(high or low) + 1):
            yield f"{number:0{len(low)}d}"


def address_of(node: str) -> str:
    """Where other nodes reach `node`, a name in Slurm, which need not be one that the network knows.

    Slurm's controller is asked only then: it would not like to hear from every task of a large job. Raises ValueError
    when neither helps.
    """
    if resolves(node):
        return node
    try:
        said = ask("scontrol", "show", "node", node)
    except ValueError as error:
        raise ValueError(f"the network knows no host {node}, and {error}: set MASTER_ADDR") from None
    found = re.search(r"\bNodeAddr=(\S+)", said)
    if found is None or not resolves(found[1]):
        known = f"its NodeAddr {found[1]} leads nowhere" if found else "Slurm has no NodeAddr of it"
        raise ValueError(
            f"the network knows no host {node}, and {known}: set MASTER_ADDR to an address of that machine"
        )
    return found[1]


def ask(*command: str, environ: Mapping[str, str] | None = None) -> str:
    """What a command of Slurm prints. No shell sees its words. Raises ValueError when it is missing, or fails."""
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, encoding="utf-8", errors="replace", timeout=_PATIENCE
        )
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be started ({error.strerror}): is it on the PATH?") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} has not answered for {_PATIENCE:.0f} s; try again later") from None
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def resolves(host: str) -> bool:
    """Whether the host has an address, as far as this machine knows."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except (socket.gaierror, UnicodeError):
        return False


def leave_step(environ: Mapping[str, str]) -> dict[str, str]:
    """For a program that a task starts for itself: alone, not one of the ranks of the step."""
    return {name: value for name, value in environ.items() if name not in OF_A_STEP}
