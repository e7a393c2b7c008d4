"""Which assignments are kept when experts are full.

C = max(min_capacity, ceil(capacity_factor * top_k * tokens / num_experts)); an expert takes its C first assignments
in the order that `drop_policy` sets, the others are dropped. Under `global` scope the tokens of all ranks of the
micro-step compete, in global token order, so the dropped set is the same in every layout. The world's rank order is the
global order of tokens (`parallel/mesh.py`), which makes a global position a local one plus the counts of ranks before.

| drop_policy | who stays                                | causal                                               |
|-------------|------------------------------------------|------------------------------------------------------|
| position    | the first tokens in global order         | yes: a later token never displaces an earlier one    |
| score       | the highest router weights               | no: a later token with a higher weight displaces one |
| random      | a keyed hash of (seed, step, layer, token) | no                                                 |

Legend: T tokens, K top_k, N = T * K assignments in token order, E experts, W ranks that share the capacity.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from moe_dist.config.schema import MoEConfig
from moe_dist.moe.routing import Routing, StepContext
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import Group


@dataclass(frozen=True)
class DispatchPlan:
    """The decisions of one layer on this rank, none of them differentiable.

    experts_TK: chosen experts. kept_TK: which assignments stay. order_N: assignments sorted by expert, stable.
    counts_WE and kept_WE: assignments of each rank of the world before and after dropping, known on every rank.
    capacity: C, or None when nothing is dropped.
    """

    experts_TK: Tensor
    kept_TK: Tensor
    order_N: Tensor
    counts_WE: Tensor
    kept_WE: Tensor
    capacity: int | None


def expert_capacity(
    capacity_factor: float | None, top_k: int, tokens: int, num_experts: int, min_capacity: int
) -> int | None:
    """Rows one expert takes; None is no limit. The product is exact: 1.1 * 10 is 11, not 11.000000000000002."""
    if capacity_factor is None:
        return None
    exact = Fraction(str(capacity_factor)) * top_k * tokens / num_experts
    return max(min_capacity, ceil(exact))


class Capacity:
    """The capacity rule of one layer."""

    def __init__(self, moe: MoEConfig, layer: int, world: Group) -> None:
        self.moe, self.layer, self.world = moe, layer, world
        self.peers = world if moe.capacity_scope == "global" else Group()

    def __call__(self, routing: Routing, step: StepContext) -> DispatchPlan:
        experts_TK = routing.experts_TK
        tokens = experts_TK.shape[0] * self.peers.size
        factor = {"train": self.moe.capacity_factor, "eval": self.moe.eval_capacity_factor, "dropless": None}[
            step.phase
        ]
        limit = expert_capacity(factor, self.moe.top_k, tokens, self.moe.num_experts, self.moe.min_capacity)

        experts_N = experts_TK.flatten()
        order_N = experts_N.argsort(stable=True)
        counts_E = experts_N.bincount(minlength=self.moe.num_experts)
        counts_WE = all_gather(counts_E[None], self.world)
        if limit is None:
            kept_N, kept_WE = torch.ones_like(experts_N, dtype=torch.bool), counts_WE
        elif self.moe.drop_policy == "position":
            kept_N, kept_WE = self._keep_first(experts_N, order_N, counts_WE, limit)
        else:
            kept_N, kept_WE = self._keep_best(routing, step, counts_WE, limit)
        plan = DispatchPlan(experts_TK, kept_N.view_as(experts_TK), order_N, counts_WE, kept_WE, limit)
        if step.witness is not None:
            step.witness.decided(self.layer, plan.experts_TK, plan.kept_TK)
        return plan

    def _keep_first(self, experts_N: Tensor, order_N: Tensor, counts_WE: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Global position of an assignment = its position among this rank's + what earlier ranks send."""
        before_WE = counts_WE.cumsum(0) - counts_WE if self.peers.size > 1 else torch.zeros_like(counts_WE)
        kept_WE = (limit - before_WE).clamp(min=0).minimum(counts_WE)
        counts_E = counts_WE[self.world.rank]
        position_N = _positions(order_N, counts_E)
        return position_N < kept_WE[self.world.rank][experts_N], kept_WE

    def _keep_best(self, routing: Routing, step: StepContext, counts_WE: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Every rank sees all assignments that compete and takes the same decision for all of them."""
        num_experts, rank = self.moe.num_experts, self.peers.rank
        experts_N = all_gather(routing.experts_TK.flatten(), self.peers)
        local = routing.experts_TK.numel()
        priority_N = self._priority(routing, step, experts_N.numel())
        by_priority_N = priority_N.argsort(descending=True, stable=True)
        order_N = by_priority_N[experts_N[by_priority_N].argsort(stable=True)]
        kept_N = _positions(order_N, experts_N.bincount(minlength=num_experts)) < limit

        if self.peers.size > 1:
            rank_N = torch.arange(self.peers.size, device=experts_N.device).repeat_interleave(local)
            cells = (rank_N * num_experts + experts_N)[kept_N].bincount(minlength=self.peers.size * num_experts)
            kept_WE = cells.view(self.peers.size, num_experts)
        else:
            kept_WE = all_gather(experts_N[kept_N].bincount(minlength=num_experts)[None], self.world)
        return kept_N[rank * local : (rank + 1) * local], kept_WE

    def _priority(self, routing: Routing, step: StepContext, assignments: int) -> Tensor:
        if self.moe.drop_policy == "random":
            first = 0 if self.peers.size > 1 else self.world.rank * assignments
            index_N = torch.arange(first, first + assignments, device=routing.experts_TK.device)
            return step.key.fold("drop", self.layer).uniform(index_N)
        scores_N = all_gather(routing.weights_TK.detach().flatten(), self.peers)
        if step.witness is not None and self.peers.size == self.world.size:
            scores_N = step.witness.scores(self.layer, "drop", scores_N)
        return scores_N


def _positions(order_N: Tensor, counts_E: Tensor) -> Tensor:
    """Position of each assignment in its expert's queue, given assignments sorted by expert."""
    starts_E = counts_E.cumsum(0) - counts_E
    ramp_N = torch.arange(order_N.numel(), device=order_N.device) - starts_E.repeat_interleave(counts_E)
    return torch.empty_like(order_N).index_copy_(0, order_N, ramp_N)
