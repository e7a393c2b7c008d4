"""DeepSpeed's collectives in our Trail: it enters them by itself, with groups of torch.

What it reduces in backward are gradients, and what it gathers, in backward too, are weights.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import deepspeed.comm.comm as comm
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.trail import Trail

_GRADIENTS, _WEIGHTS = "dp", "weights"
# Names of its backend's methods, whom one waits for in them, and the place of what a rank hands in.
_METHODS = {
    "all_reduce": (_GRADIENTS, 0),
    "reduce": (_GRADIENTS, 0),
    "reduce_scatter_tensor": (_GRADIENTS, 1),
    "reduce_scatter": (_GRADIENTS, 1),
    "all_gather_into_tensor": (_WEIGHTS, 1),
    "all_gather": (_WEIGHTS, 1),
    "all_gather_coalesced": (_WEIGHTS, 1),
    "broadcast": (_WEIGHTS, 0),
}


def note_collectives(trail: Trail) -> None:
    """From here on, in this process. After deepspeed.initialize; again for another trail."""
    backend: Any = comm.cdb
    for name, (whom, place) in _METHODS.items():
        enter = getattr(type(backend), name).__get__(backend)
        setattr(backend, name, partial(_noted, trail, name, whom, place, enter))


class _Waited:
    """A collective under way, whose waiting is told."""

    def __init__(self, work: Any, trail: Trail, whom: str) -> None:
        self._work, self._trail, self._whom = work, trail, whom

    def wait(self, *args: Any) -> Any:
        with self._trail.inside(self._whom):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _noted(trail: Trail, name: str, whom: str, place: int, enter: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """enter(*args, **named). Tensors come first among its arguments, by place or by name."""
    given = (*args, *named.values())[place]
    tensors: list[Tensor] = list(given) if isinstance(given, list | tuple) else [given]
    shape = tensors[0].shape if len(tensors) == 1 else (len(tensors),)
    groups = [value for value in (*args, *named.values()) if isinstance(value, dist.ProcessGroup)]
    trail.note(name, _ranks(groups[0] if groups else dist.group.WORLD), shape, sum(tensor.nbytes for tensor in tensors))
    with trail.inside(whom):
        work = enter(*args, **named)
    return _Waited(work, trail, whom) if hasattr(work, "wait") else work


@cache
def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
