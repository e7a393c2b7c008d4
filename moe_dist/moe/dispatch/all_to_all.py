"""Experts are cut over the ep group; rows cross it by all-to-all.

wire `ragged` sends exactly the kept rows; `padded` sends a block of equal size for every (rank, expert), so that every
message has the same length.

Legend: T tokens on this rank, K top_k, D d_model, E experts, e experts held here, S rows sent, X rows that arrived.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import combine_rows, gather_rows
from moe_dist.moe.capacity import DispatchPlan
from moe_dist.moe.dispatch.base import Arrival, order_of
from moe_dist.parallel.collectives import all_to_all
from moe_dist.parallel.mesh import Group, Mesh


@dataclass(frozen=True)
class Trip:
    """home: the rows as they left. send, receive: rows exchanged with each rank of the group. packed_S: the place of
    each row in the padded message, None on a ragged wire."""

    home: RowOrder
    send: tuple[int, ...]
    receive: tuple[int, ...]
    packed_S: Tensor | None


class AllToAllDispatcher:
    def __init__(self, mesh: Mesh, wire: Literal["ragged", "padded"]) -> None:
        self.ep, self.wire = mesh.ep, wire

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Arrival:
        # 1. Gather kept assignments, sorted by expert, hence by the rank that holds it.
        home = order_of(plan)
        rows_SD = gather_rows(x_TD, home)
        # 2. Who sends how much to whom: known already, the counts travelled with the capacity rule.
        sent_EE = plan.kept_WE[list(self.ep.ranks)].cpu()  # ep ranks x all experts
        trip, order = (_padded if self.wire == "padded" else _ragged)(home, sent_EE, self.ep, x_TD.device)
        # 3. Exchange.
        if trip.packed_S is not None:
            rows_SD = rows_SD.new_zeros(sum(trip.send), rows_SD.shape[1]).index_copy(0, trip.packed_S, rows_SD)
        x_XD = all_to_all(rows_SD, trip.send, trip.receive, self.ep)
        return Arrival(x_XD, None, order, trip, self._sent_bytes(trip, x_XD))

    def combine(self, y_XD: Tensor, weights_TK: Tensor, arrival: Arrival) -> Tensor:
        trip: Trip = arrival.trip
        rows_SD = all_to_all(y_XD, trip.receive, trip.send, self.ep)
        if trip.packed_S is not None:
            rows_SD = rows_SD.index_select(0, trip.packed_S)
        return combine_rows(rows_SD, weights_TK, trip.home)

    def _sent_bytes(self, trip: Trip, rows: Tensor) -> int:
        away = sum(trip.send) - trip.send[self.ep.rank] + sum(trip.receive) - trip.receive[self.ep.rank]
        return away * rows.shape[1] * rows.element_size()


def arrival_order(slots_R: Tensor, counts_e: Tensor, arrived: int) -> RowOrder:
    """Rows that go to one expert each, slots_R listing them expert after expert; rows not listed are padding."""
    rows_X = torch.zeros(arrived, dtype=torch.int64, device=slots_R.device)
    kept_X = torch.zeros(arrived, dtype=torch.bool, device=slots_R.device)
    rows_X[slots_R] = torch.arange(slots_R.numel(), device=slots_R.device)
    kept_X[slots_R] = True
    return RowOrder(counts_e, slots_R, rows_X[:, None], kept_X[:, None])


def held_here(sent_EE: Tensor, ep: Group) -> Tensor:
    """[ep, e]: rows that each rank of the group sends to this rank's experts."""
    return sent_EE.view(ep.size, ep.size, -1)[:, ep.rank]


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated [start, start + length) of every cell, in row-major order."""
    starts, lengths = starts.flatten(), lengths.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return torch.arange(total, device=starts.device) + shift.repeat_interleave(lengths)


def _ragged(home: RowOrder, sent_EE: Tensor, ep: Group, device: torch.device) -> tuple[Trip, RowOrder]:
    """Rows arrive as (source rank, local expert); the order lists them as (local expert, source rank)."""
    send = sent_EE[ep.rank].view(ep.size, -1).sum(1)
    held = held_here(sent_EE, ep)
    starts = (held.flatten().cumsum(0) - held.flatten()).view_as(held)
    slots_R = ranges(starts.t(), held.t()).to(device)
    trip = Trip(home, tuple(send.tolist()), tuple(held.sum(1).tolist()), None)
    return trip, arrival_order(slots_R, held.sum(0).to(device), int(held.sum()))


def _padded(home: RowOrder, sent_EE: Tensor, ep: Group, device: torch.device) -> tuple[Trip, RowOrder]:
    """Every (source rank, expert) has a block of the same size, the largest that any pair of the group needs."""
    block, num_experts = max(int(sent_EE.max()), 1), sent_EE.shape[1]
    local = num_experts // ep.size
    held = held_here(sent_EE, ep)
    packed_S = ranges(torch.arange(num_experts) * block, sent_EE[ep.rank]).to(device)
    cell = torch.arange(ep.size * local).view(ep.size, local) * block
    slots_R = ranges(cell.t(), held.t()).to(device)
    sizes = (local * block,) * ep.size
    return Trip(home, sizes, sizes, packed_S), arrival_order(slots_R, held.sum(0).to(device), sum(sizes))
