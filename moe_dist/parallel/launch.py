"""Starting and stopping a rank: alone, under torchrun, or as a task of a Slurm step.

Ranks that are all on one machine open ports on its loopback interface only.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = timedelta(minutes=10)


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

    @property
    def on_one_machine(self) -> bool:
        return self.world == self.local_world


def rank_from_environment(environ: Mapping[str, str]) -> Rank:
    """torchrun's variables win, then those of a Slurm step with several tasks; otherwise the process is alone.

    Raises ValueError when a variable is missing or is no number.
    """

    def text(name: str) -> str:
        if not environ.get(name):
            raise ValueError(f"the launcher set no {name}: start with torchrun, or as a Slurm step")
        return environ[name]

    def number(name: str) -> int:
        if not text(name).isdigit():
            raise ValueError(f"{name}={environ[name]!r} is no number: start with torchrun, or as a Slurm step")
        return int(environ[name])

    if "RANK" in environ:
        local_world = number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else 1
        address = (text("MASTER_ADDR"), number("MASTER_PORT"))
        served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Rank(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK"), local_world, address, served=served)
    if "SLURM_STEP_NUM_TASKS" in environ and number("SLURM_STEP_NUM_TASKS") > 1:
        world = number("SLURM_STEP_NUM_TASKS")
        local_world = max(1, world // number("SLURM_STEP_NUM_NODES"))
        port = number("MASTER_PORT") if "MASTER_PORT" in environ else 20000 + number("SLURM_JOB_ID") % 20000
        host = environ.get("MASTER_ADDR") or _first_host(text("SLURM_STEP_NODELIST"))
        return Rank(number("SLURM_PROCID"), world, number("SLURM_LOCALID"), local_world, (host, port))
    return Rank()


def _first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(f"{' '.join(command)} gave no host ({error}): set MASTER_ADDR") from None


def start(
    rank: Rank, device: str | None = None, threads: int | None = None, deterministic: bool = False
) -> torch.device:
    """Initialise the default process group (also for a process alone: ZeRO wants one) and choose the device.

    device: `cpu`, `cuda` or None for CUDA where there is any. deterministic: torch raises RuntimeError where it would
    run an operation whose result depends on the order of threads. Raises ValueError when CUDA is asked for and missing,
    or when the port to meet at is taken.
    """
    # Deprecations that DeepSpeed and torch.distributed have among themselves.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    torch.use_deterministic_algorithms(deterministic)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        if torch.cuda.device_count() <= rank.local_rank:
            found = torch.cuda.device_count()
            raise ValueError(
                f"local rank {rank.local_rank} needs a GPU of its own, but {found} are visible: --device cpu"
            )
        torch.cuda.set_device(rank.local_rank)
    else:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // rank.local_world))
    _export(rank)
    if rank.on_one_machine:  # nobody else to talk to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store(rank), rank=rank.rank, world_size=rank.world, timeout=TIMEOUT)
    return torch.device(name, rank.local_rank) if name == "cuda" else torch.device("cpu")


def _store(rank: Rank) -> dist.Store | None:
    """Where ranks meet; None leaves it to torch, by MASTER_ADDR and MASTER_PORT."""
    if rank.file is not None:
        return dist.FileStore(rank.file, rank.world)
    if rank.address is None:
        return dist.HashStore()
    if not rank.on_one_machine or rank.served:
        return None
    port, listener = rank.address[1], None
    if rank.rank == 0:
        # TCPStore would listen on every interface, also when told 127.0.0.1: give it a socket that does not.
        listener = _listen_on_loopback(port).detach()
    return dist.TCPStore(
        "127.0.0.1", port, rank.world, is_master=rank.rank == 0, timeout=TIMEOUT, master_listen_fd=listener
    )


def _listen_on_loopback(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise ValueError(f"port {port} of 127.0.0.1, where ranks meet: {error.strerror}; set MASTER_PORT") from None
    return listener


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

    worker must be importable. An exception in any rank is raised here; the others are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="moe_dist-") as folder:
        join = (ranks, str(Path(folder) / "store"), device, worker, args)
        torch.multiprocessing.spawn(_spawned, args=join, nprocs=ranks)


def _spawned(index: int, ranks: int, file: str, device: str | None, worker: Callable[..., None], args: Any) -> None:
    start(Rank(index, ranks, index, ranks, file=file), device)
    worker(*args)
    stop()


def stop() -> None:
    """Leave together: a rank that tears gloo down while another still talks to it can abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _export(rank: Rank) -> None:
    """The variables that libraries below read for themselves."""
    host, port = rank.address or ("127.0.0.1", 29500)
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world),
        LOCAL_RANK=str(rank.local_rank),
        LOCAL_WORLD_SIZE=str(rank.local_world),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
