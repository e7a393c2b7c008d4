"""What a rank takes of its machine: one GPU, and so many CPU threads.

Launchers differ in what they let a rank see. torchrun shows all ranks all GPUs and CPUs of the machine; Slurm may show
each task its own GPU alone, as number 0 (--gpus-per-task, --gpu-bind), and bind it to its own CPUs (--cpus-per-task).
So ranks tell each other what they see, and who sees the same shares it.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

import torch

from moe_dist.parallel.objects import gather_json
from moe_dist.parallel.slurm import Variables


@dataclass(frozen=True)
class Place:
    """Where a rank runs. machine: its identity, the same in all containers on it. cpus: those that the rank may use,
    by number. gpu: the identity of its GPU. local_world: ranks of its node, as its launcher counts them."""

    machine: str
    host: str
    cpus: tuple[int, ...]
    local_world: int
    gpu: str | None = None


def places(local_world: int, device: torch.device) -> list[Place]:
    """Of all ranks, in order. Each must call."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    mine = Place(_machine(), socket.gethostname(), tuple(sorted(os.sched_getaffinity(0))), local_world, gpu)
    return [Place(**(told | {"cpus": tuple(told["cpus"])})) for told in gather_json(asdict(mine))]


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def gpu_of_rank(local_rank: int, visible: int) -> int:
    """Its number among the GPUs that this process sees: the only one, or else the one numbered as the rank is.

    Raises ValueError when there is none. Whether another rank has taken it too, `refuse_shared_gpus` tells.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} needs a GPU of its own, but {visible} are visible: start fewer ranks on a "
            "machine, or use --device cpu"
        )
    return local_rank


def refuse_shared_gpus(ranks: Sequence[Place]) -> None:
    """Raises ValueError when two ranks have one GPU: NCCL wants one for each."""
    first: dict[str, int] = {}
    for rank, place in enumerate(ranks):
        if place.gpu is not None and first.setdefault(place.gpu, rank) != rank:
            raise ValueError(
                f"ranks {first[place.gpu]} and {rank} have the same GPU, {place.gpu} of {place.host}, and NCCL wants "
                "one for each: start fewer ranks on a machine, ask for more GPUs (Slurm: --gpus-per-task=1), or use "
                "--device cpu"
            )


def threads_of_rank(asked: int | None, environ: Mapping[str, str], rank: int, ranks: Sequence[Place]) -> int:
    """What was asked for, else OMP_NUM_THREADS, else this rank's CPUs divided among the ranks that may use them too.

    A task of a Slurm step never takes more than the --cpus-per-task that it was given.

        4 ranks on 8 shared CPUs: 2 threads each      4 ranks bound to 2 CPUs each: 2 threads each
    """
    if asked is not None:
        return asked
    if environ.get("OMP_NUM_THREADS"):
        return Variables({"OMP_NUM_THREADS": environ["OMP_NUM_THREADS"].split(",")[0].strip()}).number(
            "OMP_NUM_THREADS"
        )
    mine = ranks[rank]
    sharing = sum(place.machine == mine.machine and not set(mine.cpus).isdisjoint(place.cpus) for place in ranks)
    return min(max(1, len(mine.cpus) // sharing), cpus_of_task(environ, len(mine.cpus)))


def cpus_of_task(environ: Mapping[str, str], usable: int) -> int:
    """CPUs that this process may count on, of the `usable` ones: a Slurm task has asked for a number of them, to which
    it is bound on some clusters and not on others."""
    given = environ.get("SLURM_CPUS_PER_TASK")
    return min(usable, max(1, Variables(environ).number("SLURM_CPUS_PER_TASK"))) if given else usable


def neighbours(ranks: Sequence[Place]) -> int:
    """How many neighbouring ranks share a node everywhere: the ranks of a node, where all nodes hold equally many.

    Nodes with 4, 2 and 2 ranks: 2. So all ranks cut the world into the same groups.
    """
    return gcd(*{place.local_world for place in ranks})
