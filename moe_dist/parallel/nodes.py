"""Where the launchers of one or several machines meet, and how each starts its ranks.

On one machine nothing is open to the network. `torchrun --standalone` keeps two stores that listen on every interface,
and whoever reaches them can write what ranks read. Here the launcher meets itself in a file, and the ranks meet at a
port of the loopback interface, which rank 0 opens (`launch.py`).

With --nnodes N the launchers of N machines meet as `rendezvous.py` says, at a port of the first, which their ranks use
too. Environment variables tell each where: NODE_RANK, MASTER_ADDR and MASTER_PORT, or those of a Slurm step.
"""

import argparse
import os
import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from moe_dist.parallel.rank_logs import PREFIX, RankLogs
from moe_dist.parallel.rendezvous import Member, meet
from moe_dist.parallel.share import cpus_of_task
from moe_dist.parallel.slurm import Variables, address_of, refuse_other_tasks, step_from_environment, tasks_of_step

_BACKEND = "moe_dist"
_PORT = 29500


@dataclass(frozen=True)
class Node:
    """The machine of this launcher among those that meet, and where they do."""

    member: Member
    host: str
    port: int

    @property
    def run_id(self) -> str:
        """The name of the start, as a name of files and the same on all machines."""
        start = self.member.start
        return f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', start)[:100]}-{zlib.crc32(os.fsencode(start)):08x}"


def node_from_environment(environ: Mapping[str, str], nodes: int, command: Sequence[str]) -> Node:
    """command: what every rank runs, the same on all machines; outside Slurm it names the start.

    Raises ValueError when a variable is missing or does not fit the others.
    """
    told = Variables(environ)
    step = step_from_environment(environ) if tasks_of_step(environ) > 1 else None
    if step is None and not environ.get("NODE_RANK"):
        raise ValueError(f"set NODE_RANK: which of the NNODES={nodes} machines is this, from 0")
    number = told.number("NODE_RANK") if environ.get("NODE_RANK") or step is None else step.node
    if number >= nodes:
        raise ValueError(f"NODE_RANK={number} is not below NNODES={nodes}: machines count from 0")
    if step is None and not environ.get("MASTER_ADDR"):
        raise ValueError("set MASTER_ADDR: an address of the machine with NODE_RANK=0, as the others reach it")
    host = environ.get("MASTER_ADDR") or (address_of(step.first_node) if step is not None else "")
    port = told.port("MASTER_PORT") if environ.get("MASTER_PORT") else step.port if step is not None else _PORT
    start = step.name if step is not None else " ".join(command)
    return Node(Member(number, nodes, start, kind="node"), host, port)


class Meeting(RendezvousHandler):
    """The launchers of all machines, at the port of the first, which their ranks use too."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._store: dist.Store | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        node, member = self.node, self.node.member
        self._store = self._store or meet(member, node.host, node.port, served=False)
        return RendezvousInfo(self._store, member.number, member.total, RendezvousStoreInfo(node.host, node.port))

    def get_backend(self) -> str:
        return _BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.node.run_id

    def shutdown(self) -> bool:
        return True


def launch(args: Sequence[str]) -> None:
    """torchrun with these flags, until all ranks have ended well; else raises as it does.

    Raises ValueError for what a user got wrong.
    """
    given = run.parse_args(list(args))
    nodes = _machines(given.nnodes)
    refuse_other_tasks(os.environ, nodes)
    ranks = run.determine_local_world_size(given.nproc_per_node)
    # torchrun would set 1.
    usable = cpus_of_task(os.environ, len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable // ranks)))
    if nodes == 1:
        _run_here(given)
    else:
        command = [given.training_script, *given.training_script_args]
        _run_on_nodes(given, node_from_environment(os.environ, nodes, command))


def _machines(text: str) -> int:
    """torchrun's --nnodes; its default is 1:1."""
    if re.fullmatch(r"1:1|[1-9]\d*", text, re.ASCII) is None:
        raise ValueError(f"NNODES={text} is no number of machines: set 1 or more")
    return 1 if text == "1:1" else int(text)


def _run_here(given: argparse.Namespace) -> None:
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the launcher opens no store for the ranks
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        given.local_addr, given.rdzv_backend = "127.0.0.1", "c10d"
        given.rdzv_endpoint, given.rdzv_conf = os.path.join(folder, "rendezvous"), "store_type=file"
        _run(given)


def _run_on_nodes(given: argparse.Namespace, node: Node) -> None:
    rendezvous_handler_registry.register(_BACKEND, lambda _: Meeting(node))
    given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id = _BACKEND, f"{node.host}:{node.port}", node.run_id
    _run(given)


def _run(given: argparse.Namespace) -> None:
    folder = os.environ.get("MOE_DIST_RANK_LOGS")
    if folder:
        os.environ.setdefault(*PREFIX)
    config, command, args = run.config_from_args(given)
    if folder:
        config.logs_specs = RankLogs(folder)
    run.elastic_launch(config=config, entrypoint=command)(*args)
