"""Small values between all ranks, as JSON. torch's own functions for objects unpickle what they receive, which runs
whatever the sender likes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.trail import Trail


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of each rank of `group` (all ranks), in rank order; each must call. Tuples come back as lists, keys as
    text. The group must take CPU tensors. A process that has joined no group is alone.
    """
    mine = _encode(value)
    if not dist.is_initialized():
        return [_decode(mine)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    # Equal sizes: not every backend gathers unequal ones.
    padded = mine.new_zeros(max(int(size) for size in sizes))
    padded[: len(mine)] = mine
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    return [_decode(data[: int(size)]) for data, size in zip(received, sizes, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's value on every rank, which must all call."""
    return gather_json(value if rank_and_world()[0] == 0 else None)[0]


def rank_and_world() -> tuple[int, int]:
    """(0, 1) of a process that has joined no group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class RankFailed(RuntimeError):
    """Something failed on one rank, and all of them know."""


class RankLost(RankFailed):
    """A rank that others were talking to has ended, or cannot be reached any more."""


@contextmanager
def lost_ranks_told(trail: Trail) -> Iterator[None]:
    """Within, what the libraries for communication say of a peer that is gone is a RankLost, in one line."""
    try:
        yield
    except RuntimeError as error:
        if not _lost(error):
            raise
        doing = trail.describe()
        raise RankLost(f"rank {rank_and_world()[0]} lost another rank, which has ended; last here: {doing}") from error


def _lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistNetworkError) or "gloo/transport" in text or "remote process exited" in text


def together(work: Callable[[], Any], failure: str, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returned on each rank of `group` (all ranks), by way of JSON; each must call.

    Raises RankFailed on every rank, which opens with `failure` and names ranks, when it raised an exception on any.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = f"rank {rank_and_world()[0]}: {caught}"
    replies = gather_json((result, error), group)
    errors = [reply[1] for reply in replies if reply[1]]
    if errors:
        raise RankFailed(f"{failure}: " + "; ".join(errors))
    return [reply[0] for reply in replies]


def require_same(what: str, value: Any) -> None:
    """Raises ValueError on every rank when `value` is not the same on all of them."""
    values = gather_json(value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ValueError(
            f"{what} is not the same on all ranks: rank {others[0]} has {values[others[0]]}, rank 0 {values[0]}; "
            "give every machine the same files, and leave them alone while a run starts"
        )


def _encode(value: Any) -> Tensor:
    # In ASCII, so that lone surrogates (bytes of a command line that are no UTF-8) pass.
    return torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
