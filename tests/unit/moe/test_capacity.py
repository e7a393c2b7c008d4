"""Which assignments stay when experts are full: by hand, against a loop, and with the tokens cut over ranks."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.config.schema import MoEConfig
from moe_dist.moe import capacity
from moe_dist.moe.capacity import Capacity, DispatchPlan, expert_capacity
from moe_dist.moe.routing import Routing, StepContext
from moe_dist.parallel.mesh import Group
from tests.unit.helpers import context

POLICIES = ("position", "score", "random")


def routing_of(experts_TK: list[list[int]] | Tensor, scores_TK: list[list[float]], num_experts: int) -> Routing:
    """A Routing as the capacity rule reads it: only the chosen experts' probabilities are filled in."""
    experts, scores = torch.as_tensor(experts_TK), torch.tensor(scores_TK)
    probs_TE = torch.zeros(len(experts), num_experts).scatter(1, experts, scores)
    return Routing(probs_TE.log(), probs_TE, experts, scores)


def random_routing(tokens: int, num_experts: int, top_k: int, seed: int) -> Routing:
    """Coarse logits, so that scores tie often."""
    logits_TE = torch.randint(-2, 3, (tokens, num_experts), generator=torch.Generator().manual_seed(seed)).float()
    probs_TE = logits_TE.softmax(-1)
    experts_TK = probs_TE.topk(top_k).indices
    return Routing(logits_TE, probs_TE, experts_TK, probs_TE.gather(1, experts_TK))


def plan_of(routing: Routing, step: StepContext | None = None, layer: int = 0, **moe: object) -> DispatchPlan:
    tokens_experts = dict(num_experts=routing.probs_TE.shape[1], top_k=routing.experts_TK.shape[1])
    return Capacity(MoEConfig(**(tokens_experts | moe)), layer, Group())(routing, step or context())


@pytest.mark.parametrize(
    ("factor", "top_k", "tokens", "experts", "least", "expected"),
    [
        (1.0, 1, 8, 4, 1, 2),
        (1.0, 2, 8, 4, 1, 4),  # top_k counts
        (1.25, 1, 8, 4, 1, 3),  # 2.5 rounded up
        (1.1, 1, 100, 10, 1, 11),  # 1.1 * 10 is 11.000000000000002 in floating point
        (0.1, 1, 4, 4, 1, 1),
        (0.1, 1, 4, 4, 3, 3),  # min_capacity
        (1.0, 1, 9, 4, 1, 3),
        (100.0, 1, 4, 4, 1, 100),
        (None, 2, 8, 4, 5, None),
    ],
)
def test_formula(factor: float | None, top_k: int, tokens: int, experts: int, least: int, expected: int | None) -> None:
    assert expert_capacity(factor, top_k, tokens, experts, least) == expected


def test_four_tokens_capacity_two_by_hand() -> None:
    """Expert 0 is chosen by tokens 0, 1, 3 and takes ceil(1 * 1 * 4 / 2) = 2 of them."""
    routing = routing_of([[0], [0], [1], [0]], [[0.6], [0.9], [0.7], [0.8]], num_experts=2)
    first = plan_of(routing, capacity_factor=1.0, drop_policy="position")
    assert first.kept_TK[:, 0].tolist() == [True, True, True, False]
    best = plan_of(routing, capacity_factor=1.0, drop_policy="score")
    assert best.kept_TK[:, 0].tolist() == [False, True, True, True]
    for plan in (first, best):
        assert plan.capacity == 2
        assert plan.counts_WE.tolist() == [[3, 1]]
        assert plan.kept_WE.tolist() == [[2, 1]]
        assert plan.order_N.tolist() == [0, 1, 3, 2]


def test_second_choices_queue_in_token_order_by_hand() -> None:
    """Top-2 of 3 experts, C = ceil(0.5 * 2 * 3 / 3) = 1: token 1's first choice loses to token 0's second."""
    routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.6, 0.1], [0.8, 0.1], [0.5, 0.4]], num_experts=3)
    first = plan_of(routing, capacity_factor=0.5, drop_policy="position")
    assert first.kept_TK.tolist() == [[True, True], [False, True], [False, False]]
    best = plan_of(routing, capacity_factor=0.5, drop_policy="score")
    assert best.kept_TK.tolist() == [[True, False], [True, False], [True, False]]


def test_equal_scores_fall_back_on_position() -> None:
    routing = routing_of([[0]] * 4, [[0.5]] * 4, num_experts=2)
    plan = plan_of(routing, capacity_factor=1.0, drop_policy="score")
    assert plan.kept_TK[:, 0].tolist() == [True, True, False, False]


def kept_by_loop(routing: Routing, limit: int, policy: str, step: StepContext, layer: int) -> list[bool]:
    """Assignments queue one after another for their expert's places."""
    experts = routing.experts_TK.flatten().tolist()
    scores = routing.probs_TE.gather(1, routing.experts_TK).flatten().tolist()
    draws = step.key.fold("drop", layer).uniform(torch.arange(len(experts))).tolist()
    priority = {"position": [0.0] * len(experts), "score": scores, "random": draws}[policy]
    kept, taken = [False] * len(experts), dict.fromkeys(experts, 0)
    for n in sorted(range(len(experts)), key=lambda n: -priority[n]):
        kept[n] = taken[experts[n]] < limit
        taken[experts[n]] += kept[n]
    return kept


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.integers(1, 12),
    sizes=st.integers(1, 5).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, min(e, 3)))),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 3.0]),
    least=st.integers(1, 3),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 999),
)
def test_against_a_loop(tokens: int, sizes: tuple[int, int], factor: float, least: int, policy: str, seed: int) -> None:
    num_experts, top_k = sizes
    routing, step = random_routing(tokens, num_experts, top_k, seed), context(seed)
    plan = plan_of(routing, step, layer=3, capacity_factor=factor, min_capacity=least, drop_policy=policy)
    kept = kept_by_loop(routing, plan.capacity, policy, step, layer=3)
    assert plan.kept_TK.flatten().tolist() == kept
    chosen, stayed = plan.counts_WE[0], plan.kept_WE[0]
    assert torch.equal(stayed, chosen.clamp(max=plan.capacity))
    assert torch.equal(stayed, plan.experts_TK[plan.kept_TK].bincount(minlength=num_experts))
    assert chosen.sum() == tokens * top_k == plan.kept_TK.sum() + (~plan.kept_TK).sum()
    assert plan.order_N.tolist() == sorted(range(tokens * top_k), key=lambda n: plan.experts_TK.flatten()[n].item())


def test_random_dropping_is_a_function_of_its_key() -> None:
    routing = routing_of([[0]] * 32, [[0.5]] * 32, num_experts=2)

    def kept(step: int, layer: int) -> Tensor:
        plan = plan_of(routing, context(step), layer, capacity_factor=1.0, drop_policy="random")
        assert plan.kept_TK.sum() == 16
        return plan.kept_TK

    assert torch.equal(kept(0, 0), kept(0, 0))
    assert not torch.equal(kept(0, 0), kept(1, 0))
    assert not torch.equal(kept(0, 0), kept(0, 1))
    share = torch.stack([kept(step, 0) for step in range(200)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.2  # nobody is favoured: a standard deviation is 0.035


@pytest.mark.parametrize("policy", POLICIES)
def test_phases(policy: str) -> None:
    routing = routing_of([[0]] * 8, [[0.5]] * 8, num_experts=2)

    def kept(phase: str, eval_factor: float | None) -> int:
        factors = dict(capacity_factor=0.5, eval_capacity_factor=eval_factor)
        plan = plan_of(routing, context(phase=phase), drop_policy=policy, **factors)
        assert plan.kept_WE.sum() == plan.kept_TK.sum()
        return int(plan.kept_TK.sum())

    assert kept("train", None) == kept("train", 1.5) == 2
    assert kept("eval", None) == 8
    assert kept("eval", 1.5) == 6
    assert kept("dropless", 1.5) == 8


def test_without_limit_nothing_is_dropped() -> None:
    plan = plan_of(random_routing(9, 4, 2, seed=0), capacity_factor=None)
    assert plan.capacity is None
    assert plan.kept_TK.all()
    assert torch.equal(plan.kept_WE, plan.counts_WE)


def test_position_is_causal() -> None:
    """A token added at the end changes nothing for those before, as long as C is the same."""
    for seed in range(20):
        routing = random_routing(8, 4, 2, seed)
        cut = Routing(*(tensor[:7] for tensor in (routing.logits_TE, routing.probs_TE, routing.experts_TK)), None)
        limits = dict(capacity_factor=0.001, min_capacity=2, drop_policy="position")
        assert torch.equal(plan_of(routing, **limits).kept_TK[:7], plan_of(cut, **limits).kept_TK)


class Ranks:
    """Ranks as threads of this process: an all-gather that waits for everybody."""

    def __init__(self, world: int) -> None:
        self.world, self.box, self.barrier = world, [None] * world, threading.Barrier(world, timeout=20)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        if group.size == 1:
            return x
        self.box[group.rank] = x
        self.barrier.wait()
        joined = torch.cat(self.box)
        self.barrier.wait()
        return joined

    def run(self, work: Callable[[Group], DispatchPlan]) -> list[DispatchPlan]:
        plans: list[DispatchPlan | None] = [None] * self.world

        def one(rank: int) -> None:
            plans[rank] = work(Group(tuple(range(self.world)), rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None not in plans, "a rank failed"
        return plans


def plans_on_ranks(
    monkeypatch: pytest.MonkeyPatch, world: int, routing: Routing, step: StepContext, moe: MoEConfig
) -> list[DispatchPlan]:
    ranks, size = Ranks(world), len(routing.experts_TK) // world

    def work(group: Group) -> DispatchPlan:
        mine = slice(group.rank * size, (group.rank + 1) * size)
        tensors = (routing.logits_TE, routing.probs_TE, routing.experts_TK, routing.weights_TK)
        return Capacity(moe, 1, group)(Routing(*(tensor[mine] for tensor in tensors)), step)

    with monkeypatch.context() as patch:
        patch.setattr(capacity, "all_gather", ranks.all_gather)
        return ranks.run(work)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_global_scope_drops_the_same_on_any_number_of_ranks(
    policy: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.75, drop_policy=policy)
    for seed in range(5):
        routing, step = random_routing(16, 4, 2, seed), context(seed)
        alone = Capacity(moe, 1, Group())(routing, step)
        plans = plans_on_ranks(monkeypatch, world, routing, step, moe)
        assert (~alone.kept_TK).sum() >= 8  # C = ceil(0.75 * 2 * 16 / 4) = 6: at most 24 of 32 stay
        assert torch.equal(torch.cat([plan.kept_TK for plan in plans]), alone.kept_TK)
        for rank, plan in enumerate(plans):
            assert plan.capacity == alone.capacity == 6
            assert torch.equal(plan.counts_WE, plans[0].counts_WE)
            assert torch.equal(plan.kept_WE, plans[0].kept_WE)
            assert torch.equal(plan.counts_WE[rank], plan.experts_TK.flatten().bincount(minlength=4))
            assert torch.equal(plan.kept_WE[rank], plan.experts_TK[plan.kept_TK].bincount(minlength=4))


@pytest.mark.parametrize("policy", POLICIES)
def test_local_scope_caps_each_rank_by_its_own_tokens(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens all on expert 0, 4 on each of 2 ranks: C = ceil(1 * 1 * 4 / 2) = 2 on each, not 4 together."""
    moe = MoEConfig(num_experts=2, top_k=1, capacity_factor=1.0, capacity_scope="local", drop_policy=policy)
    routing = routing_of([[0]] * 8, [[0.1], [0.2], [0.3], [0.4]] * 2, num_experts=2)
    plans = plans_on_ranks(monkeypatch, 2, routing, context(), moe)
    expected = {"position": [True, True, False, False], "score": [False, False, True, True]}
    for plan in plans:
        assert plan.capacity == plan.kept_TK.sum() == 2
        assert plan.kept_WE.tolist() == [[2, 0], [2, 0]]
        assert plan.kept_TK[:, 0].tolist() == expected.get(policy, plan.kept_TK[:, 0].tolist())


def test_local_random_dropping_differs_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEConfig(num_experts=2, top_k=1, capacity_factor=1.0, capacity_scope="local", drop_policy="random")
    routing = routing_of([[0]] * 64, [[0.5]] * 64, num_experts=2)
    first, second = plans_on_ranks(monkeypatch, 2, routing, context(), moe)
    assert not torch.equal(first.kept_TK, second.kept_TK)
