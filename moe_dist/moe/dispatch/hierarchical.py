"""All-to-all in two steps: within the node, then across nodes in fewer, larger messages.

A row for rank (node, place) first goes to the rank of its own node with that place, over the fast links inside; there
rows of the whole node for that destination gather, and travel on together. A rank then exchanges with the other places
of its node and the same place of other nodes, not with every rank of the group (the 2D all-to-all of Tutel, arXiv
2206.03382, section 3.4). Where the group lies in one node, or has one rank on each, one of the steps moves nothing.

Legend: T tokens on this rank, D d_model, Y rows sent, Z rows halfway, X rows that arrived, w ranks of the ep group, A
its nodes, I its ranks on each, e experts of each rank. sent_wwe[i, j, k]: rows that rank i sends to expert k of rank j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.moe.choice import Choice
from moe_dist.moe.dispatch.base import RowExperts
from moe_dist.moe.dispatch.counts import dense_arrival, order_of, sent_rows, transposed
from moe_dist.moe.dispatch.wire import Format, Wire, carry_home, carry_out, pack, unpack
from moe_dist.parallel.collectives import exchange_rows
from moe_dist.parallel.mesh import Group, Mesh


class HierarchicalDispatcher:
    """Raises ValueError when the nodes of an ep group hold unequal numbers of its ranks."""

    def __init__(self, mesh: Mesh, permute: Permutation, wire_dtype: Format = "same") -> None:
        self.ep = mesh.ep
        self.node = mesh.ep_node
        self.across = mesh.ep_across
        self.permute = permute
        self.wire = Wire.of(wire_dtype)
        local = mesh.layout.ep_local
        assert (self.node.size, self.across.size) == (local, mesh.ep.size // local), "groups of another layout"

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        # 1. Gather kept assignments, sorted by the place of their rank on its node, then by node, then by expert.
        sent_wwe = sent_rows(choice.plan, self.ep)
        home = order_of(choice.plan, self.permute, self._departure(sent_wwe.shape[2]).to(x_TD.device))
        rows_YD = self.permute.gather_rows(x_TD, home)
        # 2. There in two exchanges, through the experts, and back. Rows arrive as over one: by source rank, by expert.
        trip = self.trip(sent_wwe, x_TD.device)
        order = dense_arrival(sent_wwe[:, self.ep.rank], x_TD.device)
        y_XD = experts(carry_out(rows_YD, trip, self.wire), None, order)
        y_YD = carry_home(y_XD, trip, self.wire)
        return self.permute.combine_rows(y_YD, choice.weights_TK, home), self.wire.sent_bytes(trip, x_TD)

    def _departure(self, local_experts: int) -> Tensor:
        """place_E: where rows of each expert stand among those that leave."""
        places = torch.arange(self.ep.size * local_experts).view(self.node.size, self.across.size, local_experts)
        return places.transpose(0, 1).flatten()

    def trip(self, sent_wwe: Tensor, device: torch.device) -> "TwoStepTrip":
        nodes, places = self.across.size, self.node.size
        # [from node, from place, to node, to place]
        sent_AIAI = sent_wwe.sum(2).view(nodes, places, nodes, places)
        node, place = self.across.rank, self.node.rank
        # Halfway, this rank holds what its node sends to its place on every node: as (from place, to node).
        half_IA = sent_AIAI[node, :, :, place]
        forth_Z = transposed(half_IA).to(device) if nodes > 1 and places > 1 else None
        return TwoStepTrip(
            self.node,
            self.across,
            node_send=_listed(sent_AIAI[node, place].sum(0)),
            node_receive=_listed(half_IA.sum(1)),
            across_send=_listed(half_IA.sum(0)),
            across_receive=_listed(sent_AIAI[:, :, node, place].sum(1)),
            forth_Z=forth_Z,
            back_Z=None if forth_Z is None else forth_Z.argsort(),
        )


@dataclass(frozen=True)
class TwoStepTrip:
    """Rows exchanged with each rank of both groups. forth_Z: halfway, the row that comes at each place when sorted by
    the node they go on to; back_Z its inverse; None where they are sorted as they come."""

    node: Group
    across: Group
    node_send: tuple[int, ...]
    node_receive: tuple[int, ...]
    across_send: tuple[int, ...]
    across_receive: tuple[int, ...]
    forth_Z: Tensor | None
    back_Z: Tensor | None

    @property
    def away(self) -> tuple[int, int]:
        there = _others(self.node_send, self.node) + _others(self.across_send, self.across)
        return there, _others(self.across_receive, self.across) + _others(self.node_receive, self.node)

    def there(self, rows_YD: Tensor, form: Format) -> Tensor:
        packed = exchange_rows(pack(rows_YD, form), self.node_send, self.node_receive, self.node)
        packed = _reorder(packed, self.forth_Z)
        packed = exchange_rows(packed, self.across_send, self.across_receive, self.across)
        return unpack(packed, form, rows_YD.dtype)

    def back(self, rows_XD: Tensor, form: Format) -> Tensor:
        packed = exchange_rows(pack(rows_XD, form), self.across_receive, self.across_send, self.across)
        packed = _reorder(packed, self.back_Z)
        packed = exchange_rows(packed, self.node_receive, self.node_send, self.node)
        return unpack(packed, form, rows_XD.dtype)


def _reorder(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _listed(counts: Tensor) -> tuple[int, ...]:
    return tuple(counts.tolist())


def _others(counts: tuple[int, ...], group: Group) -> int:
    """Of rows for each rank of the group, those for others than this one."""
    return sum(counts) - counts[group.rank]
