"""Which assignments are kept when experts are full.

C = max(min_capacity, ceil(capacity_factor * top_k * tokens / num_experts)), where experts that are closed
(surgery/layers.py) do not count; an expert takes its C first assignments in the order that `drop_policy` sets, the
others are dropped. Under `global` scope the tokens of all ranks of the micro-step compete, in global token order, so
the dropped set is the same in every layout. The world's rank order is the global order of tokens (`parallel/mesh.py`),
which makes a global position a local one plus the counts of ranks before.

| drop_policy | who stays                                | causal                                               |
|-------------|------------------------------------------|------------------------------------------------------|
| position    | the first tokens in global order         | yes: a later token never displaces an earlier one    |
| score       | the highest router weights               | no: a later token with a higher weight displaces one |
| random      | a keyed hash of (seed, step, layer, token) | no                                                 |

Under `position`, `drop_order` says which of a token's top_k choices wait for those of others:

| drop_order | the queue of an expert                         | causal                                              |
|------------|------------------------------------------------|-----------------------------------------------------|
| token      | token after token, whatever the choice         | yes; second choices displace later first choices    |
| choice     | first choices of all tokens, then second, ...  | no: a later first choice displaces a second one     |

GShard (arXiv 2006.16668, algorithm 1), fairseq, DeepSpeed and Tutel go by choice; Megatron-core's `position` does not
look at it. At top-2 and a factor of 0.5 token order keeps half of the first choices, choice order nine tenths;
from 1.25 on there is little between them.

What does not fit is dropped, or under `overflow: reroute` offered to the token's next choice: in rounds, in which the
assignments still without a place compete by the same policy for the places left, until nobody asks or all are taken.
Expert choice is the score policy with every token a candidate of every expert.

Legend: T tokens, K top_k, N = T * K assignments in token order, E experts, W ranks that share the capacity, U turns,
M = U * E + 1 buckets.
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.model import CapacityFactor, MoEConfig
from moe_dist.kernels.permute.order import counts_of, readable
from moe_dist.moe.choice import DispatchPlan, Routing
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import Group
from moe_dist.step import Site, StepContext

_UNEQUAL = (
    "unequal numbers of tokens, but share one capacity: give every rank as many tokens (pad, or drop the last batch), "
    "or set capacity_factor to null"
)


def expert_capacity(
    capacity_factor: float | None, top_k: int, tokens: int, num_experts: int, min_capacity: int
) -> int | None:
    """Rows one expert takes; None is no limit. The product is exact: 1.1 * 10 is 11, not 11.000000000000002."""
    return None if capacity_factor is None else _rows(_ratio(capacity_factor), top_k, tokens, num_experts, min_capacity)


def _ratio(capacity_factor: float) -> tuple[int, int]:
    return Fraction(str(capacity_factor)).as_integer_ratio()


def _rows(ratio: tuple[int, int], top_k: int, tokens: int, num_experts: int, min_capacity: int) -> int:
    return max(min_capacity, -(-ratio[0] * top_k * tokens // (ratio[1] * num_experts)))


class Capacity:
    """The capacity rule of one layer."""

    def __init__(self, moe: MoEConfig, site: Site, token_ranks: Group) -> None:
        self.moe = moe
        self.site = site
        self.index = (site.layer + 1) // moe.every - 1  # among the layers with experts
        self.token_ranks = token_ranks
        self.peers = token_ranks if moe.capacity_scope == "global" else Group()
        self.by_experts = moe.router == "expert_choice"
        self.turns = moe.top_k if moe.drop_order == "choice" else 1
        # Once, because torch.compile knows integers and no fractions.
        of_layer = [self._of_layer(moe.capacity_factor), self._of_layer(moe.eval_capacity_factor)]
        self.ratios = {f: _ratio(f) for f in (*of_layer, *moe.capacity_schedule.values()) if f is not None}

    def factor(self, step: StepContext) -> float | None:
        """The capacity factor in force: of the phase, the layer and the step."""
        moe = self.moe
        if step.phase != "train" and not self.by_experts:
            return None if step.phase == "dropless" else self._of_layer(moe.eval_capacity_factor)
        if step.phase == "eval" and moe.eval_capacity_factor is not None:
            return self._of_layer(moe.eval_capacity_factor)
        begun = [first for first in moe.capacity_schedule if first <= step.step]
        return moe.capacity_schedule[max(begun)] if begun else self._of_layer(moe.capacity_factor)

    def __call__(self, routing: Routing, step: StepContext) -> DispatchPlan:
        moe, experts_TK = self.moe, routing.experts_TK
        tokens = experts_TK.shape[0] * self.peers.size if step.real is None else step.real.total
        taking_part = moe.num_experts if routing.open_e is None else len(routing.open_e)
        factor = self.factor(step)
        limit = None
        if factor is not None:
            limit = _rows(self.ratios[factor], moe.top_k, tokens, taking_part, moe.min_capacity)
        counts_WE = all_gather(routing.stats.counts_QE.sum(0)[None], self.token_ranks)
        real_TK = None if step.real is None else step.real.mask_T[:, None].expand_as(experts_TK).contiguous()
        if real_TK is None:
            self._check_equal(counts_WE, limit)
        elif limit is not None and self.moe.capacity_scope == "local":
            raise ValueError("capacity_scope=local has no meaning where tokens are padded: set it to global")
        if limit is None:
            kept_TK, kept_WE = torch.ones_like(experts_TK, dtype=torch.bool), counts_WE
            kept_TK = kept_TK if real_TK is None else real_TK
        else:
            first = _Round(experts_TK, real_TK, counts_WE, routing.weights_TK.detach(), "drop")
            kept_TK, kept_WE = self._keep(first, self._room(torch.zeros_like(counts_WE), limit), step)
            if moe.overflow == "reroute":
                limit_E = torch.full((moe.num_experts,), limit, device=experts_TK.device)
                if routing.open_e is not None:  # closed experts have no place left
                    limit_E = torch.zeros_like(limit_E).index_fill(0, routing.open_e, limit)
                experts_TK, kept_TK, kept_WE = self._reroute(routing, step, kept_TK, kept_WE, limit_E)
        if self.by_experts:
            counts_WE = kept_WE  # nobody was refused: the experts chose
        everything = limit is None and real_TK is None
        plan = DispatchPlan(
            experts_TK, kept_TK, counts_WE, kept_WE, limit, everything=everything, shared=moe.capacity_scope == "global"
        )
        if step.witness is not None:
            step.witness.decided(self.site, plan.experts_TK, plan.kept_TK)
        return plan

    def _check_equal(self, counts_WE: Tensor, limit: int | None) -> None:
        """Every rank would count its own limit, and exchanges would not fit. The same error on all ranks."""
        if limit is None or self.token_ranks.size == 1:
            return
        assignments_W = counts_WE.sum(1)
        if not readable(counts_WE):  # told by the device, so that nobody waits to be told
            torch._assert_async((assignments_W == assignments_W[0]).all(), f"ranks hold {_UNEQUAL}")
        elif len(set(assignments_W.tolist())) > 1:
            raise ValueError(f"ranks hold {_UNEQUAL}: they have {assignments_W.tolist()} assignments")

    def _of_layer(self, factor: CapacityFactor) -> float | None:
        return factor[self.index] if isinstance(factor, list) else factor

    def _reroute(
        self, routing: Routing, step: StepContext, kept_TK: Tensor, kept_WE: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds over next choices. Every rank sees the same counts, so all of them leave after the same round."""
        assert routing.preference_TE is not None, "routers give preferences when overflow is reroute"
        num_experts, experts_TK = self.moe.num_experts, routing.experts_TK.clone()
        tried_TE = torch.zeros_like(routing.preference_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        for number in range(1, num_experts):
            # 1. The j-th homeless assignment of a token asks for the token's j-th best expert not yet tried.
            left_TE = routing.preference_TE.masked_fill(tried_TE, -torch.inf)
            ranked = left_TE.sort(dim=-1, descending=True, stable=True)
            turn_TK = ((~kept_TK).cumsum(1) - 1).clamp(min=0)
            score_TK = ranked.values.gather(1, turn_TK)
            asks_TK = ~kept_TK & score_TK.isfinite()
            if step.real is not None:
                asks_TK = asks_TK & step.real.mask_T[:, None]
            experts_TK = torch.where(asks_TK, ranked.indices.gather(1, turn_TK), experts_TK)
            tried_TE.scatter_(1, experts_TK, True)
            # 2. They compete for the places left.
            asked_E = counts_of(experts_TK.where(asks_TK, num_experts).flatten(), num_experts + 1)[:num_experts]
            asked_WE = all_gather(asked_E[None], self.token_ranks)
            # Where looking is a wait all rounds are run: those in which nobody asks change nothing.
            room_WE = self._room(kept_WE, limit)
            if readable(asked_WE) and not (bool(asked_WE.any()) and bool((room_WE > 0).any())):
                break
            again = _Round(experts_TK, asks_TK, asked_WE, score_TK, f"reroute {number}")
            placed_TK, placed_WE = self._keep(again, room_WE, step)
            kept_TK, kept_WE = kept_TK | placed_TK, kept_WE + placed_WE
        # Who found no place is where it was at first: whom it asked in vain must not change the weights of the others.
        return torch.where(kept_TK, experts_TK, routing.experts_TK), kept_TK, kept_WE

    def _room(self, kept_WE: Tensor, limit: int | Tensor) -> Tensor:
        """[1, E] places left of those that all ranks share, or [W, E] of each rank's own."""
        shared = self.peers.size == self.token_ranks.size
        return limit - (kept_WE.sum(0, keepdim=True) if shared else kept_WE)

    def _keep(self, ask: "_Round", room_WE: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """(kept_TK, kept_WE) of one round: each expert takes its first `room` in the order of the policy."""
        position = self.moe.drop_policy == "position" and not self.by_experts
        kept_N, kept_WE = self._keep_first(ask, room_WE) if position else self._keep_best(ask, room_WE, step)
        return kept_N.view_as(ask.experts_TK), kept_WE

    def _keep_first(self, ask: "_Round", room_WE: Tensor) -> tuple[Tensor, Tensor]:
        """Global position of an assignment = its position among this rank's of its turn + what is sent before: by
        earlier ranks in its turn, and by all in earlier turns. There is one turn, or under drop_order `choice` top_k.

        One expert has room for 3. Rank 0 sends it a first choice and a second, rank 1 the same:

            one turn    [[2, 2]]           before [[0, 2]]           kept [[2, 1]]             rank 0's, and rank 1's
                                                                                               earlier token
            two turns   [[1, 1], [1, 1]]   before [[0, 1], [2, 3]]   kept [[1, 1], [1, 0]]     both first choices, and
                                                                                               rank 0's second
        """
        bucket_N = ask.bucket_N(self.moe.num_experts, self.turns)
        counts_M = counts_of(bucket_N, self.turns * self.moe.num_experts + 1)
        counts_UWE = self._counts_by_turn(ask, counts_M)
        if self.peers.size > 1:
            before_UWE = (counts_UWE.flatten(0, 1).cumsum(0) - counts_UWE.flatten(0, 1)).view_as(counts_UWE)
        else:
            before_UWE = counts_UWE.cumsum(0) - counts_UWE
        kept_UWE = (room_WE - before_UWE).clamp(min=0).minimum(counts_UWE)
        kept_M = F.pad(kept_UWE[:, self.token_ranks.rank].flatten(), (0, 1))
        positions_N = _positions(bucket_N.argsort(stable=True), bucket_N, counts_M)
        return positions_N < kept_M[bucket_N], kept_UWE.sum(0)

    def _counts_by_turn(self, ask: "_Round", counts_M: Tensor) -> Tensor:
        """[U, W, E], from this rank's counts of all buckets."""
        if self.turns == 1:
            return ask.counts_WE[None]
        return all_gather(counts_M[:-1].view(1, self.turns, -1), self.token_ranks).transpose(0, 1)

    def _keep_best(self, ask: "_Round", room_WE: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Every rank sees all assignments that compete and takes the same decision for all of them.

        Buckets [0, 1, 0, 0] with priorities [.6, .9, .8, .7]: sorted by priority they are assignments 1 2 3 0, then by
        bucket, stably, 2 3 0 1. So positions are [2, 0, 0, 1], and with room for 2 each assignment 0 is dropped.
        """
        num_experts, rank, local = self.moe.num_experts, self.peers.rank, ask.experts_TK.numel()
        bucket_N = all_gather(ask.bucket_N(num_experts), self.peers)
        priority_N = self._priority(ask, step, bucket_N.numel())
        by_priority_N = priority_N.argsort(descending=True, stable=True)
        order_N = by_priority_N[bucket_N[by_priority_N].argsort(stable=True)]
        position_N = _positions(order_N, bucket_N, counts_of(bucket_N, num_experts + 1))
        own_E = room_WE[self.token_ranks.rank if len(room_WE) > 1 else 0]
        kept_N = position_N < F.pad(own_E, (0, 1))[bucket_N]

        # Counted by rank and bucket; the last bucket, of those that ask for nothing, keeps none.
        owner_N = torch.arange(bucket_N.numel(), device=bucket_N.device).div(max(local, 1), rounding_mode="floor")
        cell_N = owner_N * (num_experts + 1) + bucket_N
        kept_PE = counts_of(cell_N, self.peers.size * (num_experts + 1), kept_N).view(self.peers.size, -1)[:, :-1]
        kept_WE = kept_PE if self.peers.size > 1 else all_gather(kept_PE, self.token_ranks)
        return kept_N[rank * local : (rank + 1) * local], kept_WE

    def _priority(self, ask: "_Round", step: StepContext, assignments: int) -> Tensor:
        if self.moe.drop_policy == "random" and not self.by_experts:
            first = 0 if self.peers.size > 1 else self.token_ranks.rank * assignments
            index_N = torch.arange(first, first + assignments, device=ask.experts_TK.device)
            return step.key.fold(ask.name, self.site.number).uniform(index_N)
        scores_N = all_gather(ask.score_TK.flatten(), self.peers)
        if step.witness is not None and self.peers.size == self.token_ranks.size:
            scores_N = step.witness.scores(self.site, ask.name, scores_N)
        return scores_N


@dataclass(frozen=True)
class _Round:
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


def _positions(order_N: Tensor, bucket_N: Tensor, counts_M: Tensor) -> Tensor:
    """Position of each assignment in its bucket's queue, given assignments sorted by bucket: with buckets [1, 0, 1],
    order [1, 0, 2] and counts [1, 2], the sorted ones have positions [0, 0, 1], so the assignments [0, 0, 1]."""
    starts_M = counts_M.cumsum(0) - counts_M
    ramp_N = torch.arange(order_N.numel(), device=order_N.device) - starts_M[bucket_N[order_N]]
    return torch.empty_like(order_N).index_copy_(0, order_N, ramp_N)
