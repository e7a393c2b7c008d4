"""Taking tokens to their experts and bringing the results back.

A dispatcher carries rows between ranks; the experts sort what arrived, compute, and put every result where its row was,
so the way back is the way there reversed. Every rank enters every exchange, also with zero rows.

Legend: T tokens on this rank, K top_k, D d_model, X rows that arrived at this rank, E experts, e experts held here.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.moe.capacity import DispatchPlan
from moe_dist.moe.dispatch.counts import order_of
from moe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Arrival:
    """x_XD: rows as they arrived. order: which of this rank's experts each goes to. weights_XK: what to multiply
    results by before adding them up, or None where that happens at home. trip: for `combine` alone.

    sent_bytes: what this rank sends to other ranks in the forward pass, there and back; backward sends as much again.
    """

    x_XD: Tensor
    weights_XK: Tensor | None
    order: RowOrder
    trip: Any
    sent_bytes: int = 0


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Arrival:
        """Tokens to the ranks of their experts."""

    def combine(self, y_XD: Tensor, weights_TK: Tensor, arrival: Arrival) -> Tensor:
        """y_TD: the weighted sum of the results of each token's kept assignments."""


class LocalDispatcher:
    """All experts are here, so nothing travels. The oracle of the others."""

    def __init__(self, mesh: Mesh, permute: Permutation) -> None:
        self.permute = permute
        if mesh.ep.size > 1:
            raise ValueError(f"dispatch=local needs all experts on every rank, but ep={mesh.ep.size}: use all_to_all")

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Arrival:
        return Arrival(x_TD, weights_TK, order_of(plan, self.permute), trip=None)

    def combine(self, y_XD: Tensor, weights_TK: Tensor, arrival: Arrival) -> Tensor:
        return y_XD


def split_over_etp(plan: DispatchPlan, weights_TK: Tensor, parts: int) -> tuple[DispatchPlan, Tensor]:
    """Expert tensor parallelism as a finer dispatch: expert i is the sum of the narrower experts i * parts, ...,
    i * parts + parts - 1, and a token of expert i goes to all of them with the same weight."""
    if parts == 1:
        return plan, weights_TK
    offsets = torch.arange(parts, device=weights_TK.device)
    experts_TK = (plan.experts_TK[..., None] * parts + offsets).flatten(1)

    def each(values: Tensor) -> Tensor:
        return values[..., None].expand(*values.shape, parts).flatten(1)

    finer = DispatchPlan(experts_TK, each(plan.kept_TK), each(plan.counts_WE), each(plan.kept_WE), plan.capacity)
    return finer, each(weights_TK)
