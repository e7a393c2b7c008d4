"""Which rows go to which expert, held from both sides; and counting without waiting for the device.

Legend: X rows of x (tokens, or rows that arrived from other ranks), K assignments of each, N = X * K, R rows sorted by
expert, e experts held here.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class RowOrder:
    """A permutation and its inverse, so that forward and backward are both gathers: no scatter, no atomics.

    counts_e: rows of each local expert, int64. slots_R: the assignment (x * K + k) of each sorted row.
    rows_XK: the sorted row of each assignment, any valid index where kept_XK is False.
    fullest: None where R is the number of kept assignments. Otherwise R is what the host knew without asking for that
    number: rows past the kept ones belong to nobody, hold anything, and are never looked at; and `fullest` is the most
    rows that an expert can have.
    """

    counts_e: Tensor
    slots_R: Tensor
    rows_XK: Tensor
    kept_XK: Tensor
    fullest: int | None = None

    @cached_property
    def rows_per_expert(self) -> tuple[int, ...]:
        """counts_e on the host; waits for the device the first time."""
        return tuple(self.counts_e.tolist())

    @property
    def source_R(self) -> Tensor:
        """The row of x that each sorted row copies; computed once, but for graphs, which keep nothing."""
        kept: Tensor | None = None if traced(self.slots_R) else vars(self).get("_source_R")
        if kept is None:
            kept = self.slots_R.div(self.rows_XK.shape[1], rounding_mode="floor")
            if not traced(self.slots_R):
                vars(self)["_source_R"] = kept
        return kept

    @property
    def expert_R(self) -> Tensor:
        """The expert of each sorted row; past the last kept row, e."""
        row_R = torch.arange(self.slots_R.numel(), device=self.slots_R.device)
        return torch.searchsorted(self.counts_e.cumsum(0), row_R, right=True)

    def up_to(self, fullest: int) -> "RowOrder":
        """The same with another bound of an expert's rows."""
        return replace(self, fullest=fullest)

    @staticmethod
    def of(experts_XK: Tensor, kept_XK: Tensor | None, num_experts: int, rows: int | None = None) -> "RowOrder":
        """Sort kept assignments by expert, stable in x. Experts of dropped assignments are never looked at.

        kept_XK None: all. rows: R, at least the number of kept assignments; None: that number, for which the host waits
        where some may be dropped.
        """
        if kept_XK is None:
            kept_XK, length, rows = torch.ones_like(experts_XK, dtype=torch.bool), experts_XK.numel(), None
        else:
            length = int(kept_XK.sum()) if rows is None else rows
        bucket_N = torch.where(kept_XK, experts_XK, num_experts).flatten()
        order_N = bucket_N.argsort(stable=True)
        ramp_N = torch.arange(order_N.numel(), device=order_N.device)
        rows_XK = torch.empty_like(order_N).index_copy_(0, order_N, ramp_N).view_as(kept_XK)
        counts_e = counts_of(bucket_N, num_experts + 1)[:num_experts]
        return RowOrder(counts_e, order_N[:length], torch.where(kept_XK, rows_XK, 0), kept_XK, rows)


def counts_of(buckets_N: Tensor, number: int, counted_N: Tensor | None = None) -> Tensor:
    """How many of buckets_N (or of those where counted_N is true) are 0, 1, ..., number - 1: [number], int64.

    torch.bincount without its wait: on a GPU that one asks the host how large the largest is.
    """
    buckets_N = buckets_N.to(torch.int64)
    ones_N = torch.ones_like(buckets_N) if counted_N is None else counted_N.to(torch.int64)
    return buckets_N.new_zeros(number).scatter_add_(0, buckets_N, ones_N)


def traced(x: Tensor) -> bool:
    """Whether `x` has no numbers yet: in a pass that torch.compile traces, or that runs on fake or meta tensors."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.device.type == "meta"


def readable(x: Tensor) -> bool:
    """Whether the host can read numbers beside `x` at once. On a GPU it would wait; a traced `x` has none."""
    return x.device.type == "cpu" and not traced(x)
