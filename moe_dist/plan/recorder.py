"""Every collective of this process, seen where torch hands it to its process group.

All of torch.distributed's functions, DeepSpeed's wrappers and the layers' own end in operators of the namespace
`c10d`, which a dispatch mode sees with tensors and group, forward and backward: autograd runs a CPU's nodes on the
thread that calls backward, and takes the mode along to the threads of other devices. So nothing is wrapped or patched,
and what runs on fake tensors is seen the same way.

A group of one rank exchanges nothing, whatever is called on it: such calls are left out.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.parallel.mesh import Axis, Layout
from moe_dist.parallel.trail import Trail
from moe_dist.plan.transfer import Collective, Phase, Transfer

# Operator: (collective, which argument this rank hands in).
_OPERATORS: dict[str, tuple[Collective, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "barrier": ("barrier", 0),
}
_PHASES: dict[str, Phase] = {"backward": "backward", "update": "update"}
_AXES: tuple[Axis, ...] = ("world", "tp", "dp", "ep", "edp", "ep_node", "ep_across")


@dataclass(frozen=True, slots=True)
class Call:
    """One collective as this rank entered it.

    ranks: of its group. where: what the mesh's trail said, "backward of step 3". shapes, dtype: of what is handed in.
    sent, received: rows exchanged with each rank, of an all-to-all.
    """

    collective: Collective
    ranks: tuple[int, ...]
    phase: Phase
    where: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    bytes: int
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def describe(self) -> str:
        """For example `all_to_all of 4096 x 4096 bfloat16 over ranks 0 to 31 in backward of step 1`."""
        shapes = ", ".join(" x ".join(map(str, shape)) or "a number" for shape in self.shapes)
        what = f"{shapes} {str(self.dtype).removeprefix('torch.')}" if shapes else "nothing"
        return f"{self.collective} of {what} over ranks {self.ranks[0]} to {self.ranks[-1]} in {self.where}"


class Recorder(TorchDispatchMode):
    """Within `with Recorder(trail) as seen:`, `seen.calls` lists the collectives of this process, in order.

    trail: of the mesh, which knows the phase; None: all is forward. Raises NotImplementedError for an operator of the
    namespace c10d that it does not know.
    """

    def __init__(self, trail: Trail | None = None) -> None:
        super().__init__()
        self.trail = trail or Trail()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.note(func, args)
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: Sequence[Any]) -> None:
        """Called before an operator of c10d is."""
        name = func.overloadpacket.__name__
        if name not in _OPERATORS:
            raise NotImplementedError(f"the recorder does not know the collective c10d.{name}: add it to _OPERATORS")
        collective, place = _OPERATORS[name]
        ranks = tuple(dist.get_process_group_ranks(group_of(args)))
        if len(ranks) == 1:
            return
        tensors = [] if collective == "barrier" else list(_tensors(args[place]))
        sent = received = tuple[int, ...]()
        if name == "alltoall_base_":
            received, sent = _rows(args[0], args[3], ranks), _rows(args[1], args[4], ranks)
        self.calls.append(
            Call(
                collective,
                ranks,
                _PHASES.get(self.trail.phase, "forward"),
                self.trail.describe().rpartition(", ")[2],
                tuple(tuple(tensor.shape) for tensor in tensors),
                tensors[0].dtype if tensors else torch.uint8,
                sum(tensor.numel() * tensor.itemsize for tensor in tensors),
                sent,
                received,
            )
        )

    def transfers(self, layout: Layout, rank: int) -> list[Transfer]:
        """Calls so far, those of one collective, group, phase and element type together. `what` is the element type,
        as nobody told more; the axis is the first one whose group has these ranks."""
        calls: Counter[tuple[Any, ...]] = Counter()
        size: Counter[tuple[Any, ...]] = Counter()
        for call in self.calls:
            key = (call.collective, call.ranks, call.phase, str(call.dtype).removeprefix("torch."))
            calls[key] += 1
            size[key] += call.bytes
        return [
            Transfer(collective, axis_of(layout, rank, ranks), ranks, phase, dtype, number, size[key])
            for key, number in calls.items()
            for collective, ranks, phase, dtype in [key]
        ]


def axis_of(layout: Layout, rank: int, ranks: Sequence[int]) -> Axis:
    """The first axis whose group of `rank` has these members. Raises ValueError when none has."""
    for axis in _AXES:
        if (layout.even_nodes or not axis.startswith("ep_")) and layout.ranks(axis, rank) == tuple(ranks):
            return axis
    raise ValueError(f"ranks {list(ranks)} are no group of rank {rank} in {layout}")


def group_of(args: Sequence[Any]) -> dist.ProcessGroup:
    """The process group among the arguments of an operator of c10d."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and arg._type().qualified_name().endswith(".ProcessGroup"):
            return dist.ProcessGroup.unbox(arg)
    raise TypeError("no process group among the arguments of a collective")


def _tensors(values: Any) -> Iterator[Tensor]:
    """Of a tensor, or of nested lists of them."""
    if isinstance(values, Tensor):
        yield values
    else:
        for value in values:
            yield from _tensors(value)


def _rows(x: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Given to, or taken from, each rank; no sizes are equal ones."""
    return tuple(sizes) or (x.shape[0] // len(ranks),) * len(ranks)
