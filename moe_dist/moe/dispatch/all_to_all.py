"""Experts are cut over the ep group; rows cross it by all-to-all.

wire `ragged` sends exactly the kept rows; `padded` sends a block of equal size for every (rank, expert), so that every
message has the same length.

Legend: T tokens on this rank, K top_k, D d_model, Y rows sent, X rows that arrived, w ranks of the ep group, e experts
of each. sent_wwe[i, j, k]: rows that rank i sends to expert k of rank j.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder, readable
from moe_dist.moe.choice import Choice, DispatchPlan
from moe_dist.moe.dispatch.base import RowExperts
from moe_dist.moe.dispatch.blocks import arrival, block_rows, departure, most_rows
from moe_dist.moe.dispatch.counts import arrival_order, dense_arrival, order_of, ranges, ranks_of, sent_rows, to_device
from moe_dist.moe.dispatch.wire import Format, Wire, carry_home, carry_out, pack, unpack
from moe_dist.parallel.collectives import start_exchange
from moe_dist.parallel.mesh import Group, Mesh


class AllToAllDispatcher:
    def __init__(
        self, mesh: Mesh, permute: Permutation, wire: Literal["ragged", "padded"], wire_dtype: Format = "same"
    ) -> None:
        self.ep = mesh.ep
        self.permute = permute
        self.padded = wire == "padded"
        self.wire = Wire.of(wire_dtype)

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        # 1. Gather kept assignments, sorted by expert, hence by the rank that holds it; who sends how much to whom.
        home, trip, order = self.way(choice.plan, x_TD)
        rows_YD = self.permute.gather_rows(x_TD, home)
        # 2. There, through the experts, and back.
        y_XD = experts(carry_out(rows_YD, trip, self.wire), None, order)
        y_YD = carry_home(y_XD, trip, self.wire)
        return self.permute.combine_rows(y_YD, choice.weights_TK, home), self.wire.sent_bytes(trip, x_TD)

    def way(self, plan: DispatchPlan, x_TD: Tensor) -> tuple[RowOrder, "DirectTrip", RowOrder]:
        """(order in which rows leave, how they travel, order in which they arrive)."""
        if self.knows_sizes(plan, x_TD):
            return self.way_of_blocks(plan)
        sent_wwe = sent_rows(plan, self.ep)
        trip, order = self.trip(sent_wwe, x_TD.device)
        return order_of(plan, self.permute, int(sent_wwe[self.ep.rank].sum())), trip, order

    def knows_sizes(self, plan: DispatchPlan, x_TD: Tensor) -> bool:
        """Whether messages follow from the capacity alone, where asking for counts would be a wait."""
        return self.padded and plan.capacity is not None and not readable(x_TD)

    def way_of_blocks(self, plan: DispatchPlan) -> tuple[RowOrder, "DirectTrip", RowOrder]:
        """`way` that never waits for the host."""
        trip, order = self.trip_of_blocks(plan, self.held(plan))
        return departure(plan, self.permute), trip, order

    def held(self, plan: DispatchPlan) -> Tensor:
        """held_we: rows of each rank of the group for the experts here."""
        return ranks_of(plan.kept_WE, self.ep).unflatten(1, (self.ep.size, -1))[:, self.ep.rank]

    def trip_of_blocks(self, plan: DispatchPlan, held_we: Tensor) -> tuple["DirectTrip", RowOrder]:
        """`trip` for neighbouring experts of each rank, as many as held_we has here."""
        block = block_rows(plan)
        sizes = (held_we.shape[1] // plan.pool * block,) * self.ep.size
        order = arrival(held_we, plan.pool, block, most_rows(plan, self.ep.size), self.permute)
        return DirectTrip(self.ep, sizes, sizes), order

    def trip(self, sent_wwe: Tensor, device: torch.device) -> tuple["DirectTrip", RowOrder]:
        """How rows travel, and the experts they arrive for. Rows leave as (rank, its expert)."""
        return (_padded if self.padded else _ragged)(sent_wwe, self.ep, device)


@dataclass(frozen=True)
class DirectTrip:
    """send, receive: rows exchanged with each rank of the group. packed_Y: the place of each row in the padded message,
    None on a ragged wire."""

    ep: Group
    send: tuple[int, ...]
    receive: tuple[int, ...]
    packed_Y: Tensor | None = None

    @property
    def away(self) -> tuple[int, int]:
        return sum(self.send) - self.send[self.ep.rank], sum(self.receive) - self.receive[self.ep.rank]

    def there(self, rows_YD: Tensor, form: Format) -> Tensor:
        return self.start_there(rows_YD, form)()

    def back(self, rows_XD: Tensor, form: Format) -> Tensor:
        return self.start_back(rows_XD, form)()

    def start_there(self, rows_YD: Tensor, form: Format) -> Callable[[], Tensor]:
        """Sends; the result waits for what arrives and returns it."""
        packed, dtype = pack(rows_YD, form), rows_YD.dtype
        if self.packed_Y is not None:
            packed = packed.new_zeros(sum(self.send), packed.shape[1]).index_copy_(0, self.packed_Y, packed)
        pending = start_exchange(packed, self.send, self.receive, self.ep)
        return lambda: unpack(pending.wait(), form, dtype)

    def start_back(self, rows_XD: Tensor, form: Format, out_YD: Tensor | None = None) -> Callable[[], Tensor]:
        """The same for the way back. `out_YD`: where the rows go."""
        packed, dtype = pack(rows_XD, form), rows_XD.dtype
        # Received in place, unless they must be unpacked first.
        direct = out_YD if packed.dtype == dtype and self.packed_Y is None else None
        pending = start_exchange(packed, self.receive, self.send, self.ep, direct)

        def take() -> Tensor:
            rows = pending.wait()
            if self.packed_Y is not None:
                rows = rows.index_select(0, self.packed_Y)
            rows = unpack(rows, form, dtype)
            return rows if out_YD is None or rows is out_YD else out_YD.copy_(rows)

        return take


def _ragged(sent_wwe: Tensor, ep: Group, device: torch.device) -> tuple[DirectTrip, RowOrder]:
    """Rows arrive as (source rank, local expert); the order lists them as (local expert, source rank)."""
    send, held_we = sent_wwe[ep.rank].sum(1), sent_wwe[:, ep.rank]
    trip = DirectTrip(ep, tuple(send.tolist()), tuple(held_we.sum(1).tolist()))
    return trip, dense_arrival(held_we, device)


def _padded(sent_wwe: Tensor, ep: Group, device: torch.device) -> tuple[DirectTrip, RowOrder]:
    """Every (source rank, expert) has a block of the same size, the largest that any pair of the group needs."""
    block, local, held_we = max(int(sent_wwe.max()), 1), sent_wwe.shape[2], sent_wwe[:, ep.rank]
    cell_we = torch.arange(ep.size * local).view(ep.size, local) * block
    packed_Y = to_device(ranges(cell_we, sent_wwe[ep.rank]), device)
    slots_R, sizes = ranges(cell_we.t(), held_we.t()), (local * block,) * ep.size
    return DirectTrip(ep, sizes, sizes, packed_Y), arrival_order(slots_R, held_we.sum(0), sum(sizes), device)
