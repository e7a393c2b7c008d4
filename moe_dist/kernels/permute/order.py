"""Which rows go to which expert, held from both sides.

Legend: X rows of x (tokens, or rows that arrived from other ranks), K assignments of each, R rows kept, sorted by
expert, e experts held here.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """A permutation and its inverse, so that forward and backward are both gathers: no scatter, no atomics.

    counts_e: rows of each local expert, int64. slots_R: the assignment (x * K + k) of each sorted row.
    rows_XK: the sorted row of each assignment, any valid index where kept_XK is False.
    """

    counts_e: Tensor
    slots_R: Tensor
    rows_XK: Tensor
    kept_XK: Tensor

    @cached_property
    def rows_per_expert(self) -> tuple[int, ...]:
        """counts_e on the host; waits for the device the first time."""
        return tuple(self.counts_e.tolist())

    @cached_property
    def source_R(self) -> Tensor:
        """The row of x that each sorted row copies."""
        return self.slots_R.div(self.rows_XK.shape[1], rounding_mode="floor")

    @staticmethod
    def of(experts_XK: Tensor, kept_XK: Tensor, num_experts: int) -> "RowOrder":
        """Sort kept assignments by expert, stable in x. Experts of dropped assignments are never looked at."""
        bucket_N = torch.where(kept_XK, experts_XK, num_experts).flatten()
        counts_e = counts_of(bucket_N, num_experts + 1)[:num_experts]
        order_N = bucket_N.argsort(stable=True)
        slots_R = order_N[: int(counts_e.sum())]
        rows_N = torch.zeros_like(order_N)
        rows_N[slots_R] = torch.arange(slots_R.numel(), device=slots_R.device)
        return RowOrder(counts_e, slots_R, rows_N.view_as(kept_XK), kept_XK)


def counts_of(buckets_N: Tensor, number: int, counted_N: Tensor | None = None) -> Tensor:
    """How many of buckets_N (or of those where counted_N is true) are 0, 1, ..., number - 1: [number], int64.

    torch.bincount without its wait: on a GPU that one asks the host how large the largest is.
    """
    ones_N = torch.ones_like(buckets_N) if counted_N is None else counted_N.to(buckets_N.dtype)
    return buckets_N.new_zeros(number).scatter_add_(0, buckets_N, ones_N)
