"""Which assignments stay when experts are full: by hand, against a loop, and with the tokens cut over ranks."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.top_k.reference import top_k_experts
from moe_dist.moe import capacity, queues
from moe_dist.moe.capacity import Capacity, expert_capacity
from moe_dist.moe.choice import DispatchPlan, Routing
from moe_dist.parallel.mesh import Group
from moe_dist.step import Site, StepContext
from tests.unit.helpers import context

POLICIES = ("position", "choice", "score", "random")


def queue(policy: str) -> dict[str, str]:
    """The fields of a policy; `choice` is `position` where first choices go first."""
    return dict(drop_policy="position", drop_order="choice") if policy == "choice" else dict(drop_policy=policy)


def routing_of(experts_TK: list[list[int]] | Tensor, scores_TK: list[list[float]], num_experts: int) -> Routing:
    """A Routing as the capacity rule reads it: only the chosen experts' probabilities are filled in."""
    experts, scores = torch.as_tensor(experts_TK), torch.tensor(scores_TK)
    return as_routing(torch.zeros(len(experts), num_experts).scatter(1, experts, scores), experts)


def as_routing(probs_TE: Tensor, experts_TK: Tensor, mine: slice = slice(None)) -> Routing:
    """The `mine` part of a routing: weights and preferences are the probabilities."""
    probs_TE, experts_TK = probs_TE[mine], experts_TK[mine]
    stats = top_k_experts(probs_TE.log(), experts_TK.shape[1], chosen_TK=experts_TK)
    return Routing(experts_TK, probs_TE.gather(1, experts_TK), probs_TE.log(), probs_TE, stats)


def random_routing(tokens: int, num_experts: int, top_k: int, seed: int) -> Routing:
    """Coarse logits, so that scores tie often."""
    logits_TE = torch.randint(-2, 3, (tokens, num_experts), generator=torch.Generator().manual_seed(seed)).float()
    probs_TE = logits_TE.softmax(-1)
    experts_TK = probs_TE.topk(top_k).indices
    return as_routing(probs_TE, experts_TK)


def plan_of(routing: Routing, step: StepContext | None = None, layer: int = 0, **moe: object) -> DispatchPlan:
    tokens_experts = dict(num_experts=routing.logits_TE.shape[1], top_k=routing.experts_TK.shape[1])
    return Capacity(MoEConfig(**(tokens_experts | moe)), Site(layer), Group())(routing, step or context())


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


def test_second_choices_queue_in_token_order_by_hand() -> None:
    """Top-2 of 3 experts, C = ceil(0.5 * 2 * 3 / 3) = 1: token 1's first choice loses to token 0's second."""
    routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.6, 0.1], [0.8, 0.1], [0.5, 0.4]], num_experts=3)
    first = plan_of(routing, capacity_factor=0.5, drop_policy="position")
    assert first.kept_TK.tolist() == [[True, True], [False, True], [False, False]]
    best = plan_of(routing, capacity_factor=0.5, drop_policy="score")
    assert best.kept_TK.tolist() == [[True, False], [True, False], [True, False]]


def test_first_choices_go_first_by_hand() -> None:
    """The same with C = 1: expert 0 takes token 0's first choice, 1 token 1's, 2 token 2's; no second choice is left
    a place. With C = 2, expert 0 has one left for token 2's second, 1 for token 0's and 2 for token 1's."""
    routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.6, 0.1], [0.8, 0.1], [0.5, 0.4]], num_experts=3)
    tight = plan_of(routing, capacity_factor=0.5, drop_order="choice")
    assert tight.kept_TK.tolist() == [[True, False]] * 3
    assert tight.kept_WE.tolist() == [[1, 1, 1]] and tight.counts_WE.tolist() == [[2, 2, 2]]
    assert plan_of(routing, capacity_factor=1.0, drop_order="choice").kept_TK.all()


def test_how_many_first_choices_each_order_keeps() -> None:
    """At top-2 and half the places; from a factor of 1.25 on the orders keep about the same."""
    logits_TE = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs_TE = logits_TE.softmax(-1)
    routing = as_routing(probs_TE, probs_TE.topk(2).indices)

    def shares(order: str, factor: float) -> tuple[float, float]:
        kept_TK = plan_of(routing, capacity_factor=factor, drop_order=order).kept_TK
        return float(kept_TK[:, 0].double().mean()), float((~kept_TK.any(1)).double().mean())

    (token, alone), (choice, unserved) = shares("token", 0.5), shares("choice", 0.5)
    assert 0.47 < token < 0.53 and 0.87 < choice <= 1.0
    assert alone > 0.4 and unserved < 0.13
    assert shares("token", 1.25)[0] > 0.98 and shares("choice", 1.25)[0] == 1.0


def test_by_choice_each_rank_alone_under_local_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.75, capacity_scope="local", drop_order="choice")
    routing = random_routing(16, 4, 2, seed=3)
    for rank, plan in enumerate(plans_on_ranks(monkeypatch, 2, routing, context(), moe)):
        mine = as_routing(routing.preference_TE, routing.experts_TK, slice(8 * rank, 8 * rank + 8))
        alone = Capacity(moe, Site(1), Group())(mine, context())
        assert torch.equal(plan.kept_TK, alone.kept_TK) and not plan.kept_TK.all()
        assert torch.equal(plan.kept_WE[rank], alone.kept_WE[0])


def test_equal_scores_fall_back_on_position() -> None:
    routing = routing_of([[0]] * 4, [[0.5]] * 4, num_experts=2)
    plan = plan_of(routing, capacity_factor=1.0, drop_policy="score")
    assert plan.kept_TK[:, 0].tolist() == [True, True, False, False]


def kept_by_loop(routing: Routing, limit: int, policy: str, step: StepContext, layer: int) -> list[bool]:
    """Assignments queue one after another for their expert's places."""
    experts = routing.experts_TK.flatten().tolist()
    scores = routing.weights_TK.flatten().tolist()
    draws = step.key.fold("drop", layer).uniform(torch.arange(len(experts))).tolist()
    priority = {"position": [0.0] * len(experts), "score": scores, "random": draws}
    priority["choice"] = [-float(n % routing.experts_TK.shape[1]) for n in range(len(experts))]
    kept, taken = [False] * len(experts), dict.fromkeys(experts, 0)
    for n in sorted(range(len(experts)), key=lambda n: -priority[policy][n]):
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
    plan = plan_of(routing, step, layer=3, capacity_factor=factor, min_capacity=least, **queue(policy))
    kept = kept_by_loop(routing, plan.capacity, policy, step, layer=3)
    assert plan.kept_TK.flatten().tolist() == kept
    chosen, stayed = plan.counts_WE[0], plan.kept_WE[0]
    assert torch.equal(stayed, chosen.clamp(max=plan.capacity))
    assert torch.equal(stayed, plan.experts_TK[plan.kept_TK].bincount(minlength=num_experts))
    assert chosen.sum() == tokens * top_k == plan.kept_TK.sum() + (~plan.kept_TK).sum()


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
        plan = plan_of(routing, context(phase=phase), **queue(policy), **factors)
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
        cut = as_routing(routing.preference_TE, routing.experts_TK, slice(7))
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
        return Capacity(moe, Site(1), group)(as_routing(routing.preference_TE, routing.experts_TK, mine), step)

    with monkeypatch.context() as patch:
        for module in (capacity, queues):
            patch.setattr(module, "all_gather", ranks.all_gather)
        return ranks.run(work)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_global_scope_drops_the_same_on_any_number_of_ranks(
    policy: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=0.75, **queue(policy))
    for seed in range(5):
        routing, step = random_routing(16, 4, 2, seed), context(seed)
        alone = Capacity(moe, Site(1), Group())(routing, step)
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
    moe = MoEConfig(num_experts=2, top_k=1, capacity_factor=1.0, capacity_scope="local", **queue(policy))
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


def rerouted_by_loop(routing: Routing, limit: int, policy: str, step: StepContext, layer: int) -> list[list[int]]:
    """The expert of every assignment, -1 if it found none: token after token, round after round."""
    preference, tokens = routing.preference_TE.tolist(), range(len(routing.experts_TK))
    top_k, num_experts = routing.experts_TK.shape[1], len(preference[0])
    asks = {(t, k): e for t in tokens for k, e in enumerate(routing.experts_TK[t].tolist())}
    placed, tried, taken = {}, {t: set(routing.experts_TK[t].tolist()) for t in tokens}, [0] * num_experts
    for number in range(num_experts):
        name = f"reroute {number}" if number else "drop"
        draws = step.key.fold(name, layer).uniform(torch.arange(len(tokens) * top_k)).tolist()
        priority = {"position": dict.fromkeys(asks, 0.0)}
        priority["choice"] = {(t, k): -float(k) for t, k in asks}
        priority["random"] = {(t, k): draws[t * top_k + k] for t, k in asks}
        priority["score"] = {(t, k): preference[t][e] for (t, k), e in asks.items()}
        rank = priority[policy]
        for t, k in sorted(asks, key=lambda at, rank=rank: (-rank[at], at)):
            if taken[asks[t, k]] < limit:
                taken[asks[t, k]] += 1
                placed[t, k] = asks[t, k]
        asks = {}
        for t in tokens:
            left = sorted(set(range(num_experts)) - tried[t], key=lambda e: (-preference[t][e], e))
            asks |= zip([(t, k) for k in range(top_k) if (t, k) not in placed], left, strict=False)
            tried[t] |= {asks[t, k] for k in range(top_k) if (t, k) in asks}
    return [[placed.get((t, k), -1) for k in range(top_k)] for t in tokens]


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.integers(1, 12),
    sizes=st.integers(1, 5).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, min(e, 3)))),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25]),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 999),
)
def test_rerouting_against_a_loop(tokens: int, sizes: tuple[int, int], factor: float, policy: str, seed: int) -> None:
    num_experts, top_k = sizes
    routing, step = random_routing(tokens, num_experts, top_k, seed), context(seed)
    plan = plan_of(routing, step, 3, capacity_factor=factor, **queue(policy), overflow="reroute")
    expected = torch.tensor(rerouted_by_loop(routing, plan.capacity, policy, step, layer=3))
    assert torch.equal(torch.where(plan.kept_TK, plan.experts_TK, -1), expected)
    assert torch.equal(plan.kept_WE[0], plan.experts_TK[plan.kept_TK].bincount(minlength=num_experts))
    assert torch.equal(plan.counts_WE[0], routing.experts_TK.flatten().bincount(minlength=num_experts))
    assert all(len(set(row)) == len(row) for row in plan.experts_TK.tolist()), "a token met an expert twice"


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rerouting_on_ranks(policy: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MoEConfig(
        num_experts=4, top_k=2, capacity_factor=0.75, **queue(policy), overflow="reroute", capacity_scope=scope
    )
    for seed in range(5):
        routing, step = random_routing(16, 4, 2, seed), context(seed)
        plans = plans_on_ranks(monkeypatch, 4, routing, step, moe)
        if scope == "global":
            alone = Capacity(moe, Site(1), Group())(routing, step)
            assert torch.equal(torch.cat([plan.kept_TK for plan in plans]), alone.kept_TK)
            assert torch.equal(torch.cat([plan.experts_TK for plan in plans]), alone.experts_TK)
        for rank, plan in enumerate(plans):
            assert torch.equal(plan.kept_WE, plans[0].kept_WE)
            assert torch.equal(plan.kept_WE[rank], plan.experts_TK[plan.kept_TK].bincount(minlength=4))
            total = plan.kept_WE.sum(0) if scope == "global" else plan.kept_WE
            assert (total <= plan.capacity).all()


def test_factors_of_layers_and_steps() -> None:
    """A list gives each MoE layer its own factor; a schedule changes it as training goes."""
    routing = routing_of([[0]] * 8, [[0.5]] * 8, num_experts=2)

    def limit(index: int = 0, step: int = 0, phase: str = "train", **moe: object) -> int | None:
        rule = Capacity(MoEConfig(num_experts=2, top_k=1, **moe), Site(index), Group())
        return rule(routing, StepContext(context().key, phase, step=step)).capacity

    factors = dict(capacity_factor=[0.25, None, 1.5], eval_capacity_factor=[1.0, 2.0, None])
    assert [limit(i, **factors) for i in range(3)] == [1, None, 6]
    assert [limit(i, phase="eval", **factors) for i in range(3)] == [4, 8, None]
    schedule = dict(capacity_factor=2.0, capacity_schedule={10: 1.0, 20: 0.5, 30: None})
    assert [limit(step=step, **schedule) for step in (0, 9, 10, 19, 20, 29, 30, 99)] == [8, 8, 4, 4, 2, 2, None, None]
    assert limit(step=25, phase="dropless", **schedule) is None


def test_experts_choose_their_tokens() -> None:
    """Each of 3 experts takes the ceil(1 * 1 * 4 / 3) = 2 tokens that score highest for it; token 3 gets nobody."""
    probs_TE = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.3, 0.2], [0.1, 0.2, 0.05]])
    routing = as_routing(probs_TE, torch.arange(3).expand(4, 3))
    moe = MoEConfig(num_experts=3, top_k=1, router="expert_choice", capacity_factor=1.0)
    for phase in ("train", "eval", "dropless"):
        plan = Capacity(moe, Site(0), Group())(routing, context(phase=phase))
        assert plan.kept_TK.T.tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
        assert plan.counts_WE.tolist() == plan.kept_WE.tolist() == [[2, 2, 2]]
