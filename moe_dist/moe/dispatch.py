"""Taking tokens to their experts and bringing the results back.

A dispatcher turns x_TD and a DispatchPlan into rows sorted by local expert, and later turns the experts' outputs into
y_TD, the weighted sum over each token's kept assignments. Every rank enters every exchange, also with zero rows.

Legend: T tokens on this rank, K top_k, N = T * K assignments, D d_model, E experts, e experts held here, S rows sent,
R rows received by the local experts, W ranks of the world.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moe_dist.kernels.permute.reference import combine_rows, gather_rows
from moe_dist.moe.capacity import DispatchPlan
from moe_dist.parallel.collectives import all_to_all
from moe_dist.parallel.mesh import Group, Mesh


@dataclass(frozen=True)
class Trip:
    """How the rows travelled, for the way back.

    rows_per_expert: rows of each local expert, in order. source_S: token of each sent row. rows_TK: sent row of each
    assignment (0 where dropped). kept_TK as in the plan. wire: how they crossed the ep group; None if they did not.
    """

    rows_per_expert: tuple[int, ...]
    source_S: Tensor
    rows_TK: Tensor
    kept_TK: Tensor
    wire: "Wire | None" = None


@dataclass(frozen=True)
class Wire:
    """One exchange. `packed_S` places sent rows in the padded buffer and `unpacked_R` finds received rows in theirs;
    on a ragged wire the buffers are the rows, packed_S is None and unpacked_R only sorts by expert."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    packed_S: Tensor | None
    unpacked_R: Tensor


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, Trip]:
        """Rows for the local experts, [R, D], sorted by expert; and the way back."""

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, trip: Trip) -> Tensor:
        """y_TD: the weighted sum of each token's kept rows."""


class LocalDispatcher:
    """All experts are here: a permutation. The oracle of the others."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank = mesh.rank

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, Trip]:
        source_S, rows_TK = _sort_kept(plan)
        rows_per_expert = tuple(plan.kept_WE[self.rank].tolist())
        rows_RD = gather_rows(x_TD, source_S, rows_TK, plan.kept_TK)
        return rows_RD, Trip(rows_per_expert, source_S, rows_TK, plan.kept_TK)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, trip: Trip) -> Tensor:
        return combine_rows(rows_RD, weights_TK, trip.source_S, trip.rows_TK, trip.kept_TK)


class AllToAllDispatcher:
    """Experts are cut over the ep group; rows cross it by all-to-all.

    wire `ragged` sends exactly the kept rows; `padded` sends a block of equal size for every (rank, expert), so that
    every message has the same length.
    """

    def __init__(self, mesh: Mesh, wire: Literal["ragged", "padded"]) -> None:
        self.rank, self.ep, self.wire = mesh.rank, mesh.ep, wire

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, Trip]:
        # 1. Gather kept assignments, sorted by expert, hence by the rank that holds it.
        source_S, rows_TK = _sort_kept(plan)
        rows_SD = gather_rows(x_TD, source_S, rows_TK, plan.kept_TK)
        # 2. Who sends how much to whom: known already, the counts travelled with the capacity rule.
        sent_Ee = plan.kept_WE[list(self.ep.ranks)]  # ep ranks x all experts
        wire = _padded_wire(sent_Ee, self.ep) if self.wire == "padded" else _ragged_wire(sent_Ee, self.ep)
        rows_per_expert = _held(sent_Ee, self.ep).sum(0)
        # 3. Exchange, then sort what arrived by local expert.
        rows_RD = self._cross(rows_SD, wire)
        return rows_RD, Trip(tuple(rows_per_expert.tolist()), source_S, rows_TK, plan.kept_TK, wire)

    def combine(self, rows_RD: Tensor, weights_TK: Tensor, trip: Trip) -> Tensor:
        assert trip.wire is not None, "the rows crossed the group"
        rows_SD = self._cross_back(rows_RD, trip.wire)
        return combine_rows(rows_SD, weights_TK, trip.source_S, trip.rows_TK, trip.kept_TK)

    def _cross(self, rows_SD: Tensor, wire: Wire) -> Tensor:
        if wire.packed_S is not None:
            rows_SD = _spread(rows_SD, wire.packed_S, sum(wire.send))
        return all_to_all(rows_SD, wire.send, wire.receive, self.ep).index_select(0, wire.unpacked_R)

    def _cross_back(self, rows_RD: Tensor, wire: Wire) -> Tensor:
        rows_RD = _spread(rows_RD, wire.unpacked_R, sum(wire.receive))
        rows_SD = all_to_all(rows_RD, wire.receive, wire.send, self.ep)
        return rows_SD if wire.packed_S is None else rows_SD.index_select(0, wire.packed_S)


def make_dispatcher(kind: str, wire: Literal["ragged", "padded"], mesh: Mesh) -> Dispatcher:
    """The dispatcher named by config; `auto` has been resolved before (kernels/registry.py)."""
    if kind == "local":
        if mesh.ep.size > 1:
            raise ValueError(f"dispatch=local needs all experts on every rank, but ep={mesh.ep.size}: use all_to_all")
        return LocalDispatcher(mesh)
    if kind == "all_to_all":
        return AllToAllDispatcher(mesh, wire)
    raise ValueError(f"unknown dispatch {kind!r}: choose local or all_to_all")


def _sort_kept(plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    """(source_S, rows_TK): the token of each kept row in expert order, and the row of each assignment."""
    top_k = plan.kept_TK.shape[1]
    order_S = plan.order_N if plan.capacity is None else plan.order_N[plan.kept_TK.flatten()[plan.order_N]]
    rows_N = torch.zeros_like(plan.order_N)
    rows_N.index_copy_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
    return order_S.div(top_k, rounding_mode="floor"), rows_N.view_as(plan.kept_TK)


def _held(sent_Ee: Tensor, ep: Group) -> Tensor:
    """[ep, e]: rows that each rank of the group sends to this rank's experts."""
    return sent_Ee.view(ep.size, ep.size, -1)[:, ep.rank]


def _ragged_wire(sent_Ee: Tensor, ep: Group) -> Wire:
    """Rows arrive as (source rank, local expert); unpacked_R lists them as (local expert, source rank)."""
    send = sent_Ee[ep.rank].view(ep.size, -1).sum(1)
    held = _held(sent_Ee, ep)
    starts = (held.flatten().cumsum(0) - held.flatten()).view_as(held)
    return Wire(tuple(send.tolist()), tuple(held.sum(1).tolist()), None, _ranges(starts.t(), held.t()))


def _padded_wire(sent_Ee: Tensor, ep: Group) -> Wire:
    """Every (source rank, expert) has a block of the same size, the largest that any pair of the group needs."""
    block = max(int(sent_Ee.max()), 1)
    num_experts = sent_Ee.shape[1]
    local = num_experts // ep.size
    mine_E, held = sent_Ee[ep.rank], _held(sent_Ee, ep)
    cell_E = torch.arange(num_experts, device=sent_Ee.device) * block
    cell = torch.arange(ep.size * local, device=sent_Ee.device).view(ep.size, local) * block
    sizes = (local * block,) * ep.size
    return Wire(sizes, sizes, _ranges(cell_E, mine_E), _ranges(cell.t(), held.t()))


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated [start, start + length) of every cell, in row-major order."""
    starts, lengths = starts.flatten(), lengths.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return torch.arange(total, device=starts.device) + shift.repeat_interleave(lengths)


def _spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows at distinct `places` of a zero buffer [size, D]; the inverse of index_select."""
    return rows.new_zeros(size, rows.shape[1]).index_copy(0, places, rows)
