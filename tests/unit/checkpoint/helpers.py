"""A model of two parameters and one buffer, and an engine that only holds state: enough to save and load."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.checkpoint.layout import RunInfo
from moe_dist.checkpoint.retention import Retention
from moe_dist.checkpoint.store import take_snapshot, write_checkpoint
from moe_dist.engine.base import STATE_KINDS, Kind, Piece
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import ParamSpec, parameter

INFO = RunInfo(run={"data": "none"}, config={"optim": {"lr": 0.5}}, seed=3)
SHAPES = {"experts": (4, 5), "norm": (7,), "open": (4,)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = parameter((4, 5), ParamSpec((4, 5)))
        self.norm = parameter((7,), ParamSpec((7,)))
        self.register_buffer("open", torch.ones(4))


class HoldsState:
    """Every element of every tensor is another number, and another one at every seed."""

    def __init__(self, seed: int = 0) -> None:
        self.model: Any = Model()
        self.mesh = single_process_mesh()
        names = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, dict[str, Tensor]] = {
            kind: {
                name: torch.randn(at.shape, generator=generator) for name, at in names.items() if self._has(kind, name)
            }
            for kind in STATE_KINDS
        }
        self.restored: int | None = None

    @staticmethod
    def _has(kind: str, name: str) -> bool:
        return kind == "weight" or name != "open"

    def held(self, kind: Kind) -> Iterator[Piece]:
        for name, values in self.state[kind].items():
            yield Piece(name, tuple(values.shape), 0, values.view(-1), range(values.numel()))

    def restore(self, optimizer_step: int) -> None:
        self.restored = optimizer_step


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process, which saving and loading want."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def save(root: Path, engine: Any, step: int, keep_last: int = 9, loss: float | None = None, **retention: Any) -> Path:
    kept = Retention(keep_last=keep_last, **retention)
    return write_checkpoint(root, take_snapshot(engine, step, copy=False), INFO, kept, loss)
