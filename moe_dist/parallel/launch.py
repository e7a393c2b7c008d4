"""Starting and stopping a rank: alone, under torchrun, or as a task of a Slurm step.

Ranks that are all on one machine open ports on its loopback interface only.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from moe_dist.parallel.rendezvous import LOOPBACK, TIMEOUT, Member, meet
from moe_dist.parallel.share import gpu_of_rank, neighbours, places, refuse_shared_gpus, threads_of_rank
from moe_dist.parallel.slurm import Variables, address_of, refuse_other_tasks, step_from_environment, tasks_of_step

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Rank:
    """Who this process is, and where ranks meet: at an address, or in a file on this machine; neither when alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: tuple[str, int] | None = None
    file: str | None = None
    served: bool = False
    """torchrun serves the address itself; else rank 0 does."""
    start: str = ""
    """Which start it belongs to, as the launcher names it."""
    attempt: int = 0
    """How often torchrun has started the ranks again."""

    @property
    def on_one_machine(self) -> bool:
        return self.world == self.local_world


def rank_from_environment(environ: Mapping[str, str]) -> Rank:
    """torchrun's variables win, then those of a Slurm step with several tasks; otherwise the process is alone.

    Raises ValueError when a variable is missing or is no number, or when each task of a Slurm step has started a
    torchrun of its own.
    """
    told = Variables(environ)
    if "RANK" in environ:
        local_world = told.number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else 1
        if environ.get("GROUP_WORLD_SIZE") == "1":
            refuse_other_tasks(environ, nodes=1)
        return Rank(
            rank=told.number("RANK"),
            world=told.number("WORLD_SIZE"),
            local_rank=told.number("LOCAL_RANK"),
            local_world=local_world,
            address=(told.text("MASTER_ADDR"), told.port("MASTER_PORT")),
            served=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            start=f"torchrun {environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in environ else "",
            attempt=told.number("TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in environ else 0,
        )
    if tasks_of_step(environ) > 1:
        step = step_from_environment(environ)
        one_machine = len(step.tasks_of_nodes) == 1
        host = environ.get("MASTER_ADDR") or (LOOPBACK if one_machine else address_of(step.first_node))
        return Rank(
            rank=step.rank,
            world=step.world,
            local_rank=step.local,
            local_world=step.tasks_of_nodes[step.node],
            address=(host, told.port("MASTER_PORT") if "MASTER_PORT" in environ else step.port),
            start=step.name,
        )
    return Rank()


def start(
    rank: Rank,
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    share_gpus: bool = False,
) -> torch.device:
    """Initialise the default process group (also for a process alone: ZeRO wants one) and choose the device.

    device: `cpu`, `cuda` or None for CUDA where there is any. deterministic: torch raises RuntimeError where it would
    run an operation whose result depends on the order of threads. share_gpus: where a machine has fewer GPUs than
    ranks, they share them and talk over gloo, since NCCL wants a GPU for each; to compare numbers, not for speed.
    Raises ValueError when CUDA is asked for and missing, or when the port to meet at is taken.
    """
    # Deprecations that DeepSpeed and torch.distributed have among themselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    if deterministic != torch.are_deterministic_algorithms_enabled():  # to set it imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    visible = torch.cuda.device_count() if name == "cuda" else 0
    shared = share_gpus and 0 < visible < rank.local_world
    chosen = torch.device("cpu")
    if name == "cuda":
        number = rank.local_rank % visible if shared else gpu_of_rank(rank.local_rank, visible)
        chosen = torch.device("cuda", number)
        torch.cuda.set_device(chosen)
    _export(rank, chosen)
    if rank.on_one_machine:  # nobody else to talk to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" and not shared else "gloo"
    dist.init_process_group(backend, store=_store(rank), rank=rank.rank, world_size=rank.world, timeout=TIMEOUT)
    ranks = places(rank.local_world, chosen)
    if not shared:
        with said_once(rank):
            refuse_shared_gpus(ranks)
    os.environ["LOCAL_WORLD_SIZE"] = str(neighbours(ranks))
    torch.set_num_threads(threads_of_rank(threads, os.environ, rank.rank, ranks))
    return chosen


def _store(rank: Rank) -> dist.Store:
    """Where ranks meet."""
    if rank.file is not None:
        return dist.FileStore(rank.file, rank.world)
    if rank.address is None:
        return dist.HashStore()
    host, port = rank.address
    if rank.on_one_machine and not rank.served:
        host = LOOPBACK
    member = Member(rank.rank, rank.world, rank.start, speaks=rank.local_rank == 0)
    return meet(member, host, port, rank.served, rank.attempt)


@contextmanager
def said_once(rank: Rank) -> Iterator[None]:
    """For mistakes that every rank sees: rank 0 says so. One that it does not see is told by the first rank of each
    machine that does, which may have other files."""
    try:
        yield
    except ValueError as error:
        if rank.rank == 0:
            raise
        time.sleep(1)  # a launcher stops all ranks when one has ended: let rank 0 speak first
        if rank.local_rank == 0:
            print(f"moe-dist: rank {rank.rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def spawn(worker: Callable[..., None], ranks: int, *args: Any, device: str | None = "cpu") -> None:
    """Run worker(*args) on `ranks` new processes of this machine that form a process group, and wait for all.

    worker must be importable. An exception in any rank is raised here; the others are stopped. On `cuda`, ranks that
    outnumber the GPUs share them.
    """
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        join = (ranks, str(Path(folder) / "store"), device, worker, args)
        torch.multiprocessing.spawn(_spawned, args=join, nprocs=ranks)


def _spawned(index: int, ranks: int, file: str, device: str | None, worker: Callable[..., None], args: Any) -> None:
    start(Rank(index, ranks, index, ranks, file=file), device, share_gpus=True)
    worker(*args)
    stop()


def stop() -> None:
    """Leave together: a rank that tears gloo down while another still talks to it can abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _end_with_launcher() -> None:
    """Has Linux kill this process when torchrun has ended, however that ended, also while this process is stopped.

    torchrun gives each rank a session of its own. Where Slurm knows the processes of a step by their group and not by a
    cgroup, it ends torchrun and leaves the ranks: one that stands still would keep the lock of the run for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def _export(rank: Rank, device: torch.device) -> None:
    """The variables that libraries below read for themselves. DeepSpeed takes LOCAL_RANK for the number of the GPU."""
    host, port = rank.address or ("127.0.0.1", 29500)
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world),
        LOCAL_RANK=str(rank.local_rank if device.index is None else device.index),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
