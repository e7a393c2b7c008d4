"""Who is let in where more assignments ask than there is room for: the queues before pools of experts.

Assignments stand before the pool of their expert in the order that `drop_policy` sets (capacity.py), and the pool takes
from the front until it is full. With a floor, those among the first F of their own expert stand before all others:

    order of the queue = (is not among the first F of its expert, order of the policy)

which is the same as to grant every expert its first F, and then the rest of the room in order, whatever the expert.
An expert's number plays no part in it, and the order is over all tokens that compete, so that it is the same in every
layout. Example: a pool of experts 0 and 1 with C = 3, so 6 rows, asked in this order of tokens:

    token                    0  1  2  3  4  5  6
    expert                   0  0  0  0  0  1  1
    pool_floor 0             k  k  k  k  k  k  -      the first six of the pool
    pool_floor 0.5, F = 2    k  k  k  k  -  k  k      sure: tokens 0, 1, 5 and 6; then 2 and 3, the first of the others
    two pools of 1           k  k  k  -  -  k  k      the row that expert 1 has no use for stays empty

Where assignments ask again (rerouting), rows taken count first: an expert is sure of what it lacks to F, as long as the
pool has room.

A queue needs no exchange of assignments under `position`: with the counts of all ranks, a place in the queue of one
rank is one in that of all. Who is kept of each expert then is a matter of each rank, and the counts travel once more; a
pool of 1 does without. Under `score` and `random`, every rank sees all assignments that compete.

Nothing here waits for the device.

Legend: T tokens, K top_k, N = T * K assignments in token order, E experts, P pools, W ranks of the world, X 1 or W: who
has limits of their own, U turns, Q queues: one for each expert or pool, M = U * Q + 1 buckets, of which the last is for
assignments that ask for nothing, I ranks that compete.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.permute.order import counts_of
from moe_dist.moe.pools import Pools
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import Group
from moe_dist.step import Site, StepContext


@dataclass(frozen=True)
class Ask:
    """Assignments that ask for a place: asks_TK, or all of them when None. counts_WE: how many, by rank and expert."""

    experts_TK: Tensor
    asks_TK: Tensor | None
    counts_WE: Tensor
    score_TK: Tensor
    name: str

    def bucket_N(self, num_experts: int, turns: int = 1) -> Tensor:
        """The expert of each assignment, with more turns than one (turn, expert); those that ask for none are in a
        bucket of their own, the last. A second choice of expert 2 of 8 is in bucket 10 of 2 turns."""
        bucket_TK = self.experts_TK
        if turns > 1:
            bucket_TK = bucket_TK + num_experts * torch.arange(turns, device=bucket_TK.device)
        return (bucket_TK if self.asks_TK is None else bucket_TK.where(self.asks_TK, turns * num_experts)).flatten()


class Queues:
    """Of one layer. shared: whether all ranks of the world have one limit together."""

    def __init__(self, moe: MoEConfig, site: Site, token_ranks: Group) -> None:
        self.moe = moe
        self.site = site
        self.token_ranks = token_ranks
        self.peers = token_ranks if moe.capacity_scope == "global" else Group()
        self.shared = self.peers.size == token_ranks.size
        self.by_experts = moe.router == "expert_choice"
        self.turns = moe.top_k if moe.drop_order == "choice" else 1

    def limited(self, counts_WE: Tensor) -> Tensor:
        """[X, E]: counts by who has limits of their own."""
        return counts_WE.sum(0, keepdim=True) if self.shared else counts_WE

    def keep(self, ask: Ask, pools: Pools, kept_WE: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """(kept_TK, kept_WE) of those who ask, where kept_WE have their rows already. Every rank must call."""
        position = self.moe.drop_policy == "position" and not self.by_experts
        kept_XE = self.limited(kept_WE)
        sure_XE = None if pools.sure_E is None else (pools.sure_E - kept_XE).clamp(min=0)
        if position:
            kept_N, placed_WE = self._keep_first(ask, pools, pools.left(kept_XE), sure_XE)
        else:
            kept_N, placed_WE = self._keep_best(ask, pools, pools.left(kept_XE), sure_XE, step)
        return kept_N.view_as(ask.experts_TK), placed_WE

    def _keep_first(self, ask: Ask, pools: Pools, room_XP: Tensor, sure_XE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queues in global token order; under drop_order `choice` in turns, one for each choice."""
        num_experts = self.moe.num_experts
        bucket_N = ask.bucket_N(num_experts, self.turns)
        counts_UWE = self._counts_by_turn(ask, bucket_N)
        if pools.size == 1:
            kept_N, kept_UWE = self._front(bucket_N, counts_UWE, room_XP)
            return kept_N, kept_UWE.sum(0)
        # Before its pool, an assignment is in the bucket of (late or not, turn, pool).
        none = self.turns * num_experts // pools.size
        pool_N = bucket_N.div(pools.size, rounding_mode="floor")
        counts_UWP = pools.together(counts_UWE)
        if sure_XE is not None:
            sure_N, sure_UWE = self._front(bucket_N, counts_UWE, sure_XE)
            sure_UWP = pools.together(sure_UWE)
            pool_N = torch.where(sure_N, pool_N, pool_N + none)
            counts_UWP = torch.cat([sure_UWP, counts_UWP - sure_UWP])
        kept_N, _ = self._front(pool_N, counts_UWP, room_XP)
        kept_E = counts_of(ask.experts_TK.flatten(), num_experts, kept_N)
        return kept_N, all_gather(kept_E[None], self.token_ranks)

    def _front(self, bucket_N: Tensor, counts_UWQ: Tensor, room_XQ: Tensor) -> tuple[Tensor, Tensor]:
        """(whether an assignment is among the first `room` of its queue, how many are by turn and rank).

        Global position of an assignment = its position among this rank's of its turn + what is sent before: by earlier
        ranks in its turn, and by all in earlier turns. One queue has room for 3. Rank 0 sends it a first choice and a
        second, rank 1 the same:

            one turn    [[2, 2]]           before [[0, 2]]           kept [[2, 1]]             rank 0's, and rank 1's
                                                                                               earlier token
            two turns   [[1, 1], [1, 1]]   before [[0, 1], [2, 3]]   kept [[1, 1], [1, 0]]     both first choices, and
                                                                                               rank 0's second
        """
        if self.peers.size > 1:
            before_UWQ = (counts_UWQ.flatten(0, 1).cumsum(0) - counts_UWQ.flatten(0, 1)).view_as(counts_UWQ)
        else:
            before_UWQ = counts_UWQ.cumsum(0) - counts_UWQ
        kept_UWQ = (room_XQ - before_UWQ).clamp(min=0).minimum(counts_UWQ)
        own_M, kept_M = (F.pad(of_UWQ[:, self.token_ranks.rank].flatten(), (0, 1)) for of_UWQ in (counts_UWQ, kept_UWQ))
        positions_N = positions(bucket_N.argsort(stable=True), bucket_N, own_M)
        return positions_N < kept_M[bucket_N], kept_UWQ

    def _counts_by_turn(self, ask: Ask, bucket_N: Tensor) -> Tensor:
        """[U, W, E]"""
        if self.turns == 1:
            return ask.counts_WE[None]
        own_M = counts_of(bucket_N, self.turns * self.moe.num_experts + 1)
        return all_gather(own_M[:-1].view(1, self.turns, -1), self.token_ranks).transpose(0, 1)

    def _keep_best(
        self, ask: Ask, pools: Pools, room_XP: Tensor, sure_XE: Tensor | None, step: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Every rank sees all assignments that compete and takes the same decision for all of them.

        Buckets [0, 1, 0, 0] with priorities [.6, .9, .8, .7]: sorted by priority they are assignments 1 2 3 0, then by
        bucket, stably, 2 3 0 1. So positions are [2, 0, 0, 1], and with room for 2 each assignment 0 is dropped.
        """
        num_experts, rank, local = self.moe.num_experts, self.peers.rank, ask.experts_TK.numel()
        own = self.token_ranks.rank if len(room_XP) > 1 else 0
        bucket_N = all_gather(ask.bucket_N(num_experts), self.peers)
        by_priority_N = self._priority(ask, step, bucket_N.numel()).argsort(descending=True, stable=True)
        pool_N = bucket_N.div(pools.size, rounding_mode="floor")
        if sure_XE is not None:  # the others behind them
            late_N = ~_in_front(by_priority_N, bucket_N, sure_XE[own])
            by_priority_N = by_priority_N[late_N[by_priority_N].to(torch.int8).argsort(stable=True)]
        kept_N = _in_front(by_priority_N, pool_N, room_XP[own])

        # Counted by rank and bucket; the last bucket, of those that ask for nothing, keeps none.
        owner_N = torch.arange(bucket_N.numel(), device=bucket_N.device).div(max(local, 1), rounding_mode="floor")
        cell_N = owner_N * (num_experts + 1) + bucket_N
        kept_IE = counts_of(cell_N, self.peers.size * (num_experts + 1), kept_N).view(self.peers.size, -1)[:, :-1]
        kept_WE = kept_IE if self.peers.size > 1 else all_gather(kept_IE, self.token_ranks)
        return kept_N[rank * local : (rank + 1) * local], kept_WE

    def _priority(self, ask: Ask, step: StepContext, assignments: int) -> Tensor:
        if self.moe.drop_policy == "random" and not self.by_experts:
            first = 0 if self.peers.size > 1 else self.token_ranks.rank * assignments
            index_N = torch.arange(first, first + assignments, device=ask.experts_TK.device)
            return step.key.fold(ask.name, self.site.number).uniform(index_N)
        scores_N = all_gather(ask.score_TK.flatten(), self.peers)
        if step.witness is not None and self.shared:
            scores_N = step.witness.scores(self.site, ask.name, scores_N)
        return scores_N


def _in_front(order_N: Tensor, queue_N: Tensor, room_Q: Tensor) -> Tensor:
    """Whether each assignment is among the first `room` of its queue, where they come in the order `order_N`. Those of
    the last queue, for which there is no room given, are not."""
    sorted_N = order_N[queue_N[order_N].argsort(stable=True)]
    positions_N = positions(sorted_N, queue_N, counts_of(queue_N, len(room_Q) + 1))
    return positions_N < F.pad(room_Q, (0, 1))[queue_N]


def positions(order_N: Tensor, bucket_N: Tensor, counts_M: Tensor) -> Tensor:
    """Position of each assignment in its bucket's queue, given assignments sorted by bucket: with buckets [1, 0, 1],
    order [1, 0, 2] and counts [1, 2], the sorted ones have positions [0, 0, 1], so the assignments [0, 0, 1]."""
    starts_M = counts_M.cumsum(0) - counts_M
    ramp_N = torch.arange(order_N.numel(), device=order_N.device) - starts_M[bucket_N[order_N]]
    return torch.empty_like(order_N).index_copy_(0, order_N, ramp_N)
