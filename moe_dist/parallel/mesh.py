"""From sizes to process groups.

`Layout` is arithmetic alone: it answers who shares what with whom for any number of ranks, without starting one.
`Mesh` is one rank's view of a layout, with live process groups.

World = dp x tp. Ranks of one tp group are neighbours; an ep group is `ep` consecutive ranks of the whole world, so
expert parallelism folds over tensor parallelism (MoE Parallel Folding, arXiv 2504.14960). The world's rank order is
also the global order of tokens: rank r = dp_rank * tp + tp_rank holds the r-th slice of the micro-step's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

Axis = Literal["world", "tp", "dp", "ep", "edp"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. Raises ValueError when they do not fit the world."""

    world: int = 1
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, size in (("tp", self.tp), ("ep", self.ep)):
            if size < 1 or self.world % size:
                raise ValueError(f"{axis}={size} does not divide world size {self.world}")

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks that hold different sequences."""
        return self.world // self.tp

    @property
    def edp(self) -> int:
        """Expert-data-parallel size: ranks that hold the same experts."""
        return self.world // self.ep

    def ranks(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Members of the group of `axis` that `rank` belongs to, in order."""
        match axis:
            case "world":
                return tuple(range(self.world))
            case "tp":
                return tuple(range(rank // self.tp * self.tp, (rank // self.tp + 1) * self.tp))
            case "dp":
                return tuple(range(rank % self.tp, self.world, self.tp))
            case "ep":
                return tuple(range(rank // self.ep * self.ep, (rank // self.ep + 1) * self.ep))
            case "edp":
                return tuple(range(rank % self.ep, self.world, self.ep))
        raise ValueError(f"unknown axis {axis!r}: choose one of world, tp, dp, ep, edp")

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All groups of `axis`; together they hold every rank once."""
        first = {"world": 1, "tp": self.world, "dp": self.tp, "ep": self.world, "edp": self.ep}[axis]
        step = {"world": 1, "tp": self.tp, "dp": 1, "ep": self.ep, "edp": 1}[axis]
        return [self.ranks(axis, rank) for rank in range(0, first, step)]


@dataclass(frozen=True)
class Group:
    """One rank's membership in one group. `process_group` is None where the group is a single rank."""

    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    process_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """One rank's groups along every axis. `etp`: ranks that share the hidden units of each expert; the ep group is the
    ranks that one set of experts lies on, ep * etp of the config."""

    layout: Layout
    rank: int
    world: Group
    tp: Group
    dp: Group
    ep: Group
    edp: Group
    etp: int = 1


def single_process_mesh() -> Mesh:
    """The mesh of a process that is alone; needs no torch.distributed."""
    alone = Group()
    return Mesh(Layout(), 0, alone, alone, alone, alone, alone)


def create_mesh(ep: int, tp: int, etp: int = 1, timeout: timedelta | None = None) -> Mesh:
    """Process groups for `ep`, `etp` and `tp` over the initialised default group.

    Every rank must call this, with the same sizes. Raises ValueError when a size does not divide the world size.
    """
    if not dist.is_initialized():
        Layout(1, ep * etp, tp)
        return single_process_mesh()
    rank = dist.get_rank()
    layout = Layout(dist.get_world_size(), ep * etp, tp)
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def group(axis: Axis) -> Group:
        for ranks in layout.groups(axis):
            if ranks not in made:
                made[ranks] = _new_group(ranks, layout.world, timeout)
        mine = layout.ranks(axis, rank)
        return Group(mine, mine.index(rank), made[mine])

    world, tp_, dp, ep_, edp = (group(axis) for axis in ("world", "tp", "dp", "ep", "edp"))
    return Mesh(layout, rank, world, tp_, dp, ep_, edp, etp)


def _new_group(ranks: Sequence[int], world: int, timeout: timedelta | None) -> dist.ProcessGroup | None:
    if len(ranks) == 1:
        return None
    if len(ranks) == world:
        return dist.group.WORLD
    return dist.new_group(list(ranks), timeout=timeout)
