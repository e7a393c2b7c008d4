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

With `capacity_pool` n, n neighbouring experts share a limit of n * C (pools.py); queues.py says who is let in.

What does not fit is dropped, or under `overflow: reroute` offered to the token's next choice: in rounds, in which the
assignments still without a place compete by the same policy for the places left, until nobody asks or all are taken.
Under `over_budget: error` nothing is dropped in training: a layer that is asked for more raises on all ranks. That is
looked at where the decision is taken, so not again where a block is recomputed; an evaluation with
`eval_capacity_factor` drops, which is what it is there to measure.
Expert choice is the score policy with every token a candidate of every expert; it has no pools.

Legend: T tokens, K top_k, E experts, P pools, W ranks of the world, X 1 or W: who has limits of their own.
"""

from fractions import Fraction

import torch
from torch import Tensor

from moe_dist.config.model import CapacityFactor, MoEConfig
from moe_dist.kernels.permute.order import counts_of, readable
from moe_dist.moe.choice import DispatchPlan, Routing
from moe_dist.moe.pools import Pools
from moe_dist.moe.queues import Ask, Queues
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import Group
from moe_dist.step import Site, StepContext

_UNEQUAL = (
    "unequal numbers of tokens, but share one capacity: give every rank as many tokens (pad, or drop the last batch), "
    "or set capacity_factor to null"
)


def exact_ratio(capacity_factor: float) -> tuple[int, int]:
    """1.1 is (11, 10). Taken beforehand, as torch.compile knows integers and no fractions."""
    return Fraction(str(capacity_factor)).as_integer_ratio()


def expert_capacity(
    capacity_factor: float | tuple[int, int] | None, top_k: int, tokens: int, num_experts: int, min_capacity: int
) -> int | None:
    """Rows one expert takes; None is no limit. The product is exact: 1.1 * 10 is 11, not 11.000000000000002.

    capacity_factor: a number, or its `exact_ratio`.
    """
    if capacity_factor is None:
        return None
    over, under = capacity_factor if isinstance(capacity_factor, tuple) else exact_ratio(capacity_factor)
    return max(min_capacity, -(-over * top_k * tokens // (under * num_experts)))


class Capacity:
    """The capacity rule of one layer."""

    def __init__(self, moe: MoEConfig, site: Site, token_ranks: Group) -> None:
        self.moe = moe
        self.site = site
        self.index = (site.layer - moe.first_layer) // moe.every  # among the layers with experts
        self.token_ranks = token_ranks
        self.queues = Queues(moe, site, token_ranks)
        self.by_experts = moe.router == "expert_choice"
        of_layer = [self._of_layer(moe.capacity_factor), self._of_layer(moe.eval_capacity_factor)]
        self.floor = exact_ratio(moe.pool_floor)
        self.ratios = {f: exact_ratio(f) for f in (*of_layer, *moe.capacity_schedule.values()) if f is not None}

    def factor(self, step: StepContext) -> float | None:
        """The capacity factor in force: of the phase, the layer and the step."""
        moe = self.moe
        if step.phase != "train" and not self.by_experts:
            return None if step.phase == "dropless" else self._of_layer(moe.eval_capacity_factor)
        if step.phase == "eval" and moe.eval_capacity_factor is not None:
            return self._of_layer(moe.eval_capacity_factor)
        return self._of_layer(moe.factor_at(step.step))

    def __call__(self, routing: Routing, step: StepContext) -> DispatchPlan:
        """Every rank must call. Raises ValueError, on all of them, where ranks hold unequal numbers of tokens, and
        under over_budget=error where there is more to do than places."""
        moe, experts_TK = self.moe, routing.experts_TK
        tokens = experts_TK.shape[0] * self.queues.peers.size if step.real is None else step.real.total
        taking_part = moe.num_experts if routing.open_e is None else len(routing.open_e)
        factor = self.factor(step)
        ratio = None if factor is None else self.ratios[factor]
        limit = expert_capacity(ratio, moe.top_k, tokens, taking_part, moe.min_capacity)
        counts_WE = all_gather(routing.stats.counts_QE.sum(0)[None], self.token_ranks)
        real_TK = None if step.real is None else step.real.mask_T[:, None].expand_as(experts_TK).contiguous()
        if real_TK is None:
            self._check_equal(counts_WE, limit)
        elif limit is not None and self.moe.capacity_scope == "local":
            raise ValueError("capacity_scope=local has no meaning where tokens are padded: set it to global")
        if limit is None:
            kept_TK, kept_WE = torch.ones_like(experts_TK, dtype=torch.bool), counts_WE
            kept_TK = kept_TK if real_TK is None else real_TK
            over_P = counts_WE.new_zeros(moe.num_experts // moe.capacity_pool)
        else:
            pools = Pools.of(moe, self.floor, limit, routing.open_e, experts_TK.device)
            asked_XE = self.queues.limited(counts_WE)
            if moe.over_budget == "error" and step.phase == "train":
                pools.refuse_over(asked_XE, limit, Fraction(moe.top_k * tokens, taking_part), self.site)
            first = Ask(experts_TK, real_TK, counts_WE, routing.weights_TK.detach(), "drop")
            kept_TK, kept_WE = self.queues.keep(first, pools, torch.zeros_like(counts_WE), step)
            over_P = pools.over(asked_XE)
            if moe.overflow == "reroute":
                experts_TK, kept_TK, kept_WE = self._reroute(routing, step, kept_TK, kept_WE, pools)
        if self.by_experts:  # nobody was refused: the experts chose
            counts_WE, over_P = kept_WE, torch.zeros_like(over_P)
        plan = DispatchPlan(
            *(experts_TK, kept_TK, counts_WE, kept_WE, limit, over_P),
            pool=moe.capacity_pool,
            everything=limit is None and real_TK is None,
            shared=moe.capacity_scope == "global",
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
        self, routing: Routing, step: StepContext, kept_TK: Tensor, kept_WE: Tensor, pools: Pools
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
            left_XP = pools.left(self.queues.limited(kept_WE))
            # Where looking is a wait all rounds are run: those in which nobody asks change nothing.
            if readable(asked_WE) and not (bool(asked_WE.any()) and bool((left_XP > 0).any())):
                break
            again = Ask(experts_TK, asks_TK, asked_WE, score_TK, f"reroute {number}")
            placed_TK, placed_WE = self.queues.keep(again, pools, kept_WE, step)
            kept_TK, kept_WE = kept_TK | placed_TK, kept_WE + placed_WE
        # Who found no place is where it was at first: whom it asked in vain must not change the weights of the others.
        return torch.where(kept_TK, experts_TK, routing.experts_TK), kept_TK, kept_WE
