"""What points that run at the same time on one machine get each: cores, threads, GPUs.

    cores 0-7, at_once 3    ->  0-2, 3-5, 6-7
    GPUs 0-3, at_once 2     ->  0-1, 2-3    where each process of a point has one; with fewer, all points see all

A point that runs alone gets what this process has. Timings are among what a study measures: so no two points share a
core, and more points than cores are refused.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from moe_dist.parallel.slurm import leave_step

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Share:
    """Of the machine. gpus: as CUDA_VISIBLE_DEVICES names them; None: all that this process sees."""

    cores: frozenset[int]
    gpus: tuple[str, ...] | None


def shares(at_once: int, ranks: int, cores: set[int], gpus: Sequence[str]) -> list[Share]:
    """One for each of `at_once` points. Raises ValueError where there are fewer cores than points."""
    if at_once > len(cores):
        raise ValueError(
            f"at_once={at_once} is more than the {len(cores)} cores that this process may use, and no two points may "
            "share one; lower at_once in the study, or for this start with --at-once"
        )
    enough = at_once > 1 and len(gpus) >= at_once * ranks
    parts = _divide(sorted(cores), at_once), _divide(gpus, at_once) if enough else [None] * at_once
    return [Share(frozenset(part), None if some is None else tuple(some)) for part, some in zip(*parts, strict=True)]


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def environment(share: Share, at_once: int, ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """For the process that trains a point with `ranks` ranks. A number of threads that is in `environ` already stays
    where it is smaller. train.threads of the point's configuration wins over both."""
    own = leave_step(environ)
    if at_once > 1:
        threads = max(1, len(share.cores) // ranks)
        asked = own.get("OMP_NUM_THREADS", "")
        own["OMP_NUM_THREADS"] = str(min(threads, int(asked)) if asked.isdigit() and int(asked) else threads)
    if share.gpus is not None:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    return own


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Processes that this thread starts within run on these cores alone."""
    before = os.sched_getaffinity(0)
    if cores == before:
        yield
        return
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _divide(things: Sequence[Thing], parts: int) -> list[Sequence[Thing]]:
    """Neighbours together, the longer parts first."""
    size, more = divmod(len(things), parts)
    starts = [part * size + min(part, more) for part in range(parts + 1)]
    return [things[first:last] for first, last in pairwise(starts)]
