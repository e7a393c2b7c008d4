"""Stages of a micro-step, and the sizes that they are worked out from.

Legend: B batch, S sequence, T = B * S tokens of a data-parallel rank, t of them that this rank routes, o outside
tensor-parallel regions, a bytes of a number.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.engine.base import compute_dtype
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group, Layout
from moe_dist.plan.rows import Rows

WIDE = 4
"""Bytes of what is computed in fp32 whatever the precision."""
INDEX = 8
"""Bytes of an index."""


@dataclass(frozen=True, slots=True)
class Stage:
    """kept: bytes from its forward to its backward pass. dispatch: of rows that travelled, kept too. spike: the most
    that its backward pass holds besides for a moment, gradients of parameters apart. elements: of the parameters whose
    gradients it makes. logits: a part of the spike. forward: the most that its forward pass holds besides, where that
    is much; else the loss, when all is kept, needs more."""

    name: str
    kept: int
    dispatch: int = 0
    spike: int = 0
    elements: int = 0
    logits: int = 0
    forward: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Stages of a block in forward order. again: where it is recomputed, what is kept of it until then. number: of a
    decoder's block; None: what is before and behind them."""

    stages: tuple[Stage, ...]
    again: int | None = None
    number: int | None = None

    def name_of(self, stage: Stage) -> str:
        """Of one of the stages, for people: "block 3, attention"."""
        return stage.name if self.number is None else f"block {self.number}, {stage.name}"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one micro-step on one rank. model: with its backends named. skewed: as routing can be, not as it should. came:
    rows of a layer as they were."""

    model: ModelConfig
    layout: Layout
    rank: int
    batch: int
    seq_len: int
    sequence_parallel: bool
    dtype: torch.dtype
    cuda: bool
    skewed: bool = False
    came: Rows | None = None

    @staticmethod
    def of(
        config: Config, shape: BatchShape, layout: Layout, rank: int, model: ModelConfig, cuda: bool, **routing: Any
    ) -> "Sizes":
        dtype, cut = compute_dtype(config.engine.precision), config.parallel.sequence_parallel and layout.tp > 1
        return Sizes(model, layout, rank, shape.micro_batch, shape.seq_len, cut, dtype, cuda, **routing)

    @property
    def each(self) -> int:
        """a"""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """T"""
        return self.batch * self.seq_len

    @property
    def routed(self) -> int:
        """t"""
        return self.tokens // self.layout.tp

    @property
    def outside(self) -> int:
        """o"""
        return self.routed if self.sequence_parallel else self.tokens

    @property
    def heads(self) -> HeadAssignment:
        tp = self.layout.ranks("tp", self.rank)
        return HeadAssignment.of(self.model.query_heads, self.model.num_kv_heads, Group(tp, tp.index(self.rank)))

    def numbers(self, *sizes: int) -> int:
        """Bytes of a tensor of so many rows and columns."""
        count = self.each
        for size in sizes:
            count *= size
        return count

    def norm(self) -> tuple[int, int]:
        """(kept by a norm on the residual stream: its input, and 1 / rms, with LayerNorm the mean too; held for a
        moment by its backward)."""
        rows, width, layer = self.outside, self.model.d_model, self.model.norm == "layer"
        spike = 2 * self.numbers(rows, width) if self.cuda or layer else 4 * WIDE * rows * width
        return self.numbers(rows, width) + (2 if layer else 1) * WIDE * rows, spike

    def feed_forward_norm(self) -> tuple[int, int]:
        """The same of the one before a feed-forward. Beside attention its input is that of attention's norm, or it is
        that norm itself."""
        kept, spike = self.norm()
        if self.model.block == "parallel":
            return 0, 0
        return kept - (0 if self.model.block == "sequential" else self.numbers(self.outside, self.model.d_model)), spike

    def flow(self) -> int:
        """What waits while attention's backward pass goes on: the gradient of what the block gives, and beside a
        feed-forward that of what this one read."""
        return self.numbers(self.outside, self.model.d_model) * (1 if self.model.block == "sequential" else 2)
