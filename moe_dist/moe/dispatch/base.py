"""What a dispatcher is: it takes tokens to their experts and brings the results back.

The experts sort what arrived, compute, and put every result where its row was, so the way back is the way there
reversed. Every rank enters every exchange, also with zero rows.

Legend: T tokens on this rank, K assignments of a token, D d_model, X rows that arrived at this rank.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder, readable
from moe_dist.moe.choice import Choice, DispatchPlan
from moe_dist.moe.dispatch.counts import order_of
from moe_dist.parallel.mesh import Mesh


class RowExperts(Protocol):
    """The experts that this rank holds, on rows: y[x] = sum over kept k of weights[x, k] * E_i(x).

    x_XD: rows as they arrived. order: which of the experts each goes to. weights_XK: None where results are weighed at
    home.
    """

    def __call__(self, x_XD: Tensor, weights_XK: Tensor | None, order: RowOrder, /) -> Tensor: ...


class Dispatcher(Protocol):
    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        """There, through the experts, and back: (y_TD, sent_bytes).

        y_TD: the weighted sum of the results of each token's kept assignments. sent_bytes: what this rank sends to
        other ranks in the forward pass, there and back, of rows as wide as x_TD; backward sends as much again.
        """


class LocalDispatcher:
    """All experts are here, so nothing travels. The oracle of the others."""

    def __init__(self, mesh: Mesh, permute: Permutation) -> None:
        self.permute = permute
        if mesh.ep.size > 1:
            raise ValueError(f"dispatch=local needs all experts on every rank, but ep={mesh.ep.size}: use all_to_all")

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        return experts(x_TD, choice.weights_TK, self.order(choice.plan)), 0

    def order(self, plan: DispatchPlan) -> RowOrder:
        """Where asking for the number of rows would be a wait, it is bounded by what the host knows."""
        kept_TK, num_experts = plan.kept_TK, plan.kept_WE.shape[1]
        if readable(kept_TK) or plan.everything:
            return order_of(plan, self.permute)
        tokens, top_k = kept_TK.shape
        fullest, rows = tokens, tokens * top_k
        if plan.pool_rows is not None:
            fullest = min(plan.pool_rows, tokens)
            rows = min(rows, num_experts // plan.pool * plan.pool_rows)
        return self.permute.sort_rows(plan.experts_TK, kept_TK, num_experts, max(rows, 1)).up_to(max(fullest, 1))


class EtpDispatcher:
    """Expert tensor parallelism: another dispatcher, between the `parts` narrower experts that make one each."""

    def __init__(self, inner: Dispatcher, parts: int) -> None:
        self.inner = inner
        self.parts = parts

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        return self.inner.carry(x_TD, in_parts(choice, self.parts), experts)


def in_parts(choice: Choice, parts: int) -> Choice:
    """A finer choice: expert i is the sum of the narrower experts i * parts, ..., i * parts + parts - 1, and a token of
    expert i goes to all of them with the same weight.

    With 2 parts, a token of experts [3, 0] with weights [.7, .3] is one of [6, 7, 0, 1] with [.7, .7, .3, .3].
    """
    plan = choice.plan
    offsets = torch.arange(parts, device=plan.experts_TK.device)

    def each(values: Tensor) -> Tensor:
        return values[..., None].expand(*values.shape, parts).flatten(1)

    finer = replace(
        plan,
        experts_TK=(plan.experts_TK[..., None] * parts + offsets).flatten(1),
        kept_TK=each(plan.kept_TK),
        counts_WE=each(plan.counts_WE),
        kept_WE=each(plan.kept_WE),
        # Parts of a pool's experts may lie on several ranks: each has room for what the pool takes.
        capacity=plan.pool_rows,
        pool=1,
    )
    return replace(choice, plan=finer, weights_TK=each(choice.weights_TK))
