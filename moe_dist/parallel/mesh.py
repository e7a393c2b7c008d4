"""From sizes to process groups.

`Layout` is arithmetic alone: it answers who shares what with whom for any number of ranks, without starting one.
`Mesh` is one rank's view of a layout. It comes from `create_mesh`, with live process groups; from
`single_process_mesh`; or from `mesh_without_processes`, which builds the layers of any rank of any layout on one
machine, to see what that rank holds.

World = dp x tp. Ranks of one tp group are neighbours; an ep group is the ranks that one set of experts lies on, ep *
etp consecutive ranks of the whole world, so expert parallelism folds over tensor parallelism (MoE Parallel Folding,
arXiv 2504.14960). The world's rank order is also the global order of tokens: rank r = dp_rank * tp + tp_rank holds the
r-th slice of the micro-step's tokens.

A node is `node_size` consecutive ranks. An ep group that spans nodes is cut both ways, for exchanges in two steps:
`ep_node` are its ranks on one node, `ep_across` its ranks with the same place on each of its nodes.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.trail import Trail

Axis = Literal["world", "tp", "dp", "ep", "edp", "ep_node", "ep_across"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. ep: ranks over which one set of experts is spread; etp: ranks that share the hidden units of
    each expert; node_size None is one node. Raises ValueError when they do not fit the world."""

    world: int = 1
    ep: int = 1
    tp: int = 1
    node_size: int | None = None
    etp: int = 1

    def __post_init__(self) -> None:
        experts = ("ep", self.ep) if self.etp == 1 else ("ep*etp", self.expert_ranks)
        for axis, size in (("tp", self.tp), ("etp", self.etp), experts):
            if size < 1 or self.world % size:
                raise ValueError(f"{axis}={size} does not divide world size {self.world}")
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"node_size={self.node_size} is below 1")

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks that hold different sequences."""
        return self.world // self.tp

    @property
    def expert_ranks(self) -> int:
        """Size of an ep group: ranks that one set of experts lies on."""
        return self.ep * self.etp

    @property
    def edp(self) -> int:
        """Expert-data-parallel size: ranks that hold the same experts."""
        return self.world // self.expert_ranks

    @property
    def even_nodes(self) -> bool:
        """Whether every ep group has equally many ranks on each of its nodes."""
        node = self.node_size or self.world
        return node >= self.world or node % self.expert_ranks == 0 or self.expert_ranks % node == 0

    @property
    def ep_local(self) -> int:
        """Ranks of an ep group on one node. Raises ValueError when its nodes hold unequal numbers of them."""
        if not self.even_nodes:
            raise ValueError(
                f"ep groups of {self.expert_ranks} consecutive ranks lie unevenly on nodes of "
                f"node_size={self.node_size}: make one a multiple of the other, or use dispatch=all_to_all"
            )
        return min(self.expert_ranks, self.node_size or self.world)

    def ranks(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Members of the group of `axis` that `rank` belongs to, in order."""
        experts = self.expert_ranks
        match axis:
            case "world":
                return tuple(range(self.world))
            case "tp":
                return tuple(range(rank // self.tp * self.tp, (rank // self.tp + 1) * self.tp))
            case "dp":
                return tuple(range(rank % self.tp, self.world, self.tp))
            case "ep":
                return tuple(range(rank // experts * experts, (rank // experts + 1) * experts))
            case "edp":
                return tuple(range(rank % experts, self.world, experts))
            case "ep_node":
                first = rank // self.ep_local * self.ep_local
                return tuple(range(first, first + self.ep_local))
            case "ep_across":
                start = rank // experts * experts
                return tuple(range(start + rank % self.ep_local, start + experts, self.ep_local))
        raise ValueError(f"unknown axis {axis!r}: choose one of {', '.join(get_args(Axis))}")

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All groups of `axis`; together they hold every rank once."""
        world, experts = range(self.world), self.expert_ranks
        match axis:  # the first rank of every group
            case "ep_node":
                firsts = list(world[:: self.ep_local])
            case "ep_across":
                firsts = [start + place for start in world[::experts] for place in range(self.ep_local)]
            case _:
                stop = {"world": 1, "tp": self.world, "dp": self.tp, "ep": self.world, "edp": experts}[axis]
                step = {"world": 1, "tp": self.tp, "dp": 1, "ep": experts, "edp": 1}[axis]
                firsts = list(range(0, stop, step))
        return [self.ranks(axis, rank) for rank in firsts]


@dataclass(frozen=True)
class Group:
    """One rank's membership in one group. `process_group` is None where the group is a single rank, or has no
    processes. trail: where its collectives are noted. axis: of the mesh; groups of two axes can be the same ranks."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    process_group: dist.ProcessGroup | None = None
    trail: Trail = field(default_factory=Trail, compare=False, repr=False)
    axis: Axis = field(default="world", compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def note(self, what: str, x: Tensor | None = None) -> None:
        """Called before every collective on the group, with what this rank hands in; a graph that torch.compile makes
        of them notes nothing."""
        if torch.compiler.is_compiling():
            return
        assert self.size == 1 or self.process_group is not None, f"{what} in a mesh without processes"
        if x is None:
            self.trail.note(what, self.ranks)
        else:
            self.trail.note(what, self.ranks, x.shape, x.nbytes)

    def waiting(self) -> AbstractContextManager[None]:
        """Around what lasts until the other ranks have done their part."""
        return nullcontext() if torch.compiler.is_compiling() else self.trail.inside(self.axis)

    def entering(self, what: str, x: Tensor) -> AbstractContextManager[None]:
        """`note`, and around the collective `waiting`."""
        self.note(what, x)
        return self.waiting()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        return self  # a copied layer talks to the same ranks


@dataclass(frozen=True)
class Mesh:
    """One rank's groups along every axis. ep: the layout.expert_ranks that one set of experts lies on. ep_node and
    ep_across are groups of one where layout.even_nodes is false. sequence_parallel: between tensor-parallel regions,
    each tp rank keeps only its slice of the tokens."""

    layout: Layout
    rank: int
    world: Group
    tp: Group
    dp: Group
    ep: Group
    edp: Group
    ep_node: Group = Group()
    ep_across: Group = Group()
    sequence_parallel: bool = False

    @property
    def etp(self) -> int:
        """Ranks that share the hidden units of each expert."""
        return self.layout.etp

    @property
    def token_ranks(self) -> Group:
        """The ranks among which the tokens of a micro-step are cut, in the global order of tokens: those whose tokens
        compete for capacity and are averaged over by losses. Every rank of the world has a slice of its own."""
        return self.world

    @property
    def trail(self) -> Trail:
        """What this rank did last, in any of its groups."""
        return self.world.trail


def single_process_mesh() -> Mesh:
    """The mesh of a process that is alone; needs no torch.distributed."""
    return mesh_without_processes(Layout(), 0)


def mesh_without_processes(layout: Layout, rank: int, sequence_parallel: bool = False) -> Mesh:
    """The mesh that `rank` of `layout` would have. Layers built on it hold what they would hold there; an exchange over
    more than one rank is an AssertionError."""

    def group(axis: Axis) -> Group:
        ranks = layout.ranks(axis, rank)
        return Group(ranks, ranks.index(rank), axis=axis)

    return _mesh_of(layout, rank, group, sequence_parallel)


def create_mesh(
    ep: int,
    tp: int,
    etp: int = 1,
    node_size: int | None = None,
    timeout: timedelta | None = None,
    trail: Trail | None = None,
    sequence_parallel: bool = False,
) -> Mesh:
    """Process groups for `ep`, `etp` and `tp` over the initialised default group.

    node_size: ranks of a node; None asks LOCAL_WORLD_SIZE, and is the whole world where that is not set. trail: where
    collectives are noted, a new one if None. Every rank must call this, with the same sizes. Raises ValueError when a
    size does not divide the world size.
    """
    if not dist.is_initialized():
        return mesh_without_processes(Layout(1, ep, tp, etp=etp), 0)
    rank, local = dist.get_rank(), os.environ.get("LOCAL_WORLD_SIZE")
    if node_size is None and local is not None:
        node_size = int(local)
    layout = Layout(dist.get_world_size(), ep, tp, node_size, etp)
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    trail = trail or Trail()

    def group(axis: Axis) -> Group:
        for ranks in layout.groups(axis):
            if ranks not in made:
                made[ranks] = _new_group(ranks, layout.world, timeout)
        mine = layout.ranks(axis, rank)
        return Group(mine, mine.index(rank), made[mine], trail, axis)

    return _mesh_of(layout, rank, group, sequence_parallel)


def own_communicator(mesh: Mesh, axis: Axis) -> Group:
    """This rank's group of `axis` once more, for exchanges that run beside those of the mesh, in no fixed order with
    them. Every rank must call; a mesh without processes gives its own group back."""
    mine: Group = getattr(mesh, axis)
    if mine.process_group is None:
        return mine
    made = {ranks: dist.new_group(list(ranks)) for ranks in mesh.layout.groups(axis)}
    return replace(mine, process_group=made[mine.ranks])


def _mesh_of(layout: Layout, rank: int, group: Callable[[Axis], Group], sequence_parallel: bool) -> Mesh:
    """`group` is called for the axes in the same order on all ranks."""
    return Mesh(
        layout,
        rank,
        world=group("world"),
        tp=group("tp"),
        dp=group("dp"),
        ep=group("ep"),
        edp=group("edp"),
        # Uneven nodes matter to the hierarchical dispatcher alone, which refuses them.
        ep_node=group("ep_node") if layout.even_nodes else Group(),
        ep_across=group("ep_across") if layout.even_nodes else Group(),
        sequence_parallel=sequence_parallel and layout.tp > 1,
    )


def _new_group(ranks: Sequence[int], world: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == world:
        return dist.group.WORLD
    return dist.new_group(list(ranks), timeout=timeout)
