"""Who sends how many rows to whom: arithmetic on counts that every rank knows, on the host.

Legend: w ranks of the ep group, e experts of each, E = w * e experts, X rows that arrived, R rows sorted by expert.
sent_wwe[i, j, k]: rows that rank i sends to expert k of rank j.
"""

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.moe.choice import DispatchPlan
from moe_dist.parallel.mesh import Group


def sent_rows(plan: DispatchPlan, ep: Group) -> Tensor:
    """sent_wwe. Known already: the counts travelled with the capacity rule.

    With ep = 2 and four experts, rank 0's row of kept_WE [5, 0, 2, 1] says: 5 and 0 rows to rank 0, 2 and 1 to rank 1.
    """
    return ranks_of(plan.kept_WE, ep).cpu().view(ep.size, ep.size, -1)


def ranks_of(counts_WE: Tensor, ep: Group) -> Tensor:
    """The rows of this ep group, which is consecutive ranks of the world: [P, E]."""
    first = ep.ranks[0]
    return counts_WE[first : first + ep.size]


def order_of(plan: DispatchPlan, permute: Permutation, place_E: Tensor | None = None) -> RowOrder:
    """Kept assignments of this rank sorted by expert, or by place_E[expert], a permutation."""
    experts_TK = plan.experts_TK if place_E is None else place_E[plan.experts_TK]
    return permute.sort_rows(experts_TK, None if plan.everything else plan.kept_TK, plan.kept_WE.shape[1], None)


def arrival_order(slots_R: Tensor, counts_e: Tensor, arrived: int, device: torch.device) -> RowOrder:
    """Rows that go to one expert each, slots_R listing them expert after expert; rows not listed are padding.

    slots_R [2, 0, 3] of 4 rows with counts [1, 2]: row 2 is for expert 0, rows 0 and 3 for expert 1. So rows_X, where
    each row is when sorted, is [1, -, 0, 2], and row 1 is not kept.
    """
    rows_per_expert, slots_R = tuple(counts_e.tolist()), slots_R.to(device)
    rows_X = torch.zeros(arrived, dtype=torch.int64, device=device)
    kept_X = torch.zeros(arrived, dtype=torch.bool, device=device)
    rows_X[slots_R] = torch.arange(slots_R.numel(), device=device)
    kept_X[slots_R] = True
    order = RowOrder(counts_e.to(device), slots_R, rows_X[:, None], kept_X[:, None])
    vars(order)["rows_per_expert"] = rows_per_expert  # the host knows: nobody needs to wait for the device to ask
    return order


def dense_arrival(held_we: Tensor, device: torch.device) -> RowOrder:
    """The order of rows that arrive as (source rank, local expert), held_we of each, without padding.

    Rank 0 sends 2 rows for expert 0 and 1 for expert 1, rank 1 sends 0 and 3: held_we [[2, 1], [0, 3]]. Rows 0 1 are
    for expert 0, row 2 and rows 3 4 5 for expert 1, so slots_R is as they lie; with [[1, 2], [3, 0]] it is 0 3 4 5 1 2.
    """
    slots_R = transposed(held_we)
    return arrival_order(slots_R, held_we.sum(0), slots_R.numel(), device)


def transposed(cells: Tensor) -> Tensor:
    """Rows lie cell after cell in (i, j) order: their indices in (j, i) order."""
    flat = cells.flatten()
    starts = (flat.cumsum(0) - flat).view_as(cells)
    return ranges(starts.t(), cells.t())


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated [start, start + length) of every cell, in row-major order: starts [5, 0, 9] and lengths [2, 0, 3]
    give 5 6 9 10 11."""
    starts, lengths = starts.flatten(), lengths.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return torch.arange(total, device=starts.device) + shift.repeat_interleave(lengths)
