"""Where drops are counted: at the expert that the router chose, at the place in the sequence and in the micro-step, and
by how frequent the token is. Against loops over tokens."""

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.models.decoder import Decoder
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, DispatchPlan
from moe_dist.moe.drops import FREQUENCIES, PLACES, Drops, drops_of, marks
from moe_dist.moe.losses import MoEStats
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import RealTokens, Site, StepContext
from tests.unit.helpers import tiny_model
from tests.unit.moe.test_capacity import plan_of, random_routing, routing_of

VOCAB = 24
FREQUENCY_V = torch.arange(VOCAB) % FREQUENCIES


def ids(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def marked(tokens: int, seq_len: int, ranks: Group | None = None) -> Tensor:
    return marks(ids(tokens), ranks or Group(), seq_len, FREQUENCY_V)


def counted(plan: DispatchPlan, asks_TK: Tensor, seq_len: int, first: int = 0, whole: int | None = None) -> Drops:
    """Token after token, assignment after assignment. first: of the micro-step's `whole` tokens, the first one here."""
    tokens, num_experts = len(asks_TK), plan.kept_WE.shape[1]
    by = [[0] * number for number in (num_experts, PLACES, PLACES, FREQUENCIES, FREQUENCIES)]
    for token, token_id in enumerate(ids(tokens).tolist()):
        place = (first + token) % seq_len * PLACES // seq_len
        part, frequency = (first + token) * PLACES // (whole or tokens), token_id % FREQUENCIES
        for choice in range(asks_TK.shape[1]):
            if asks_TK[token, choice]:
                by[4][frequency] += 1
                if not plan.kept_TK[token, choice]:
                    for counts, at in zip(
                        by, (int(plan.experts_TK[token, choice]), place, part, frequency), strict=False
                    ):
                        counts[at] += 1
    return Drops(*map(torch.tensor, by))


def assert_same(found: Drops, expected: Drops) -> None:
    for name, counts in vars(expected).items():
        assert torch.equal(getattr(found, name), counts), name


def test_places_by_hand() -> None:
    def place(first: int, tokens: int, seq_len: int) -> Tensor:
        return marks(torch.zeros(first + tokens, dtype=torch.int64), Group(), seq_len, None)[0, first:]

    assert place(30, 4, 32).tolist() == [15, 15, 0, 0]
    assert place(0, 4, 4).tolist() == [0, 4, 8, 12]
    assert place(15, 3, 16).tolist() == [15, 0, 1]
    assert place(0, 100, 100).bincount().tolist() == [7, 6, 6, 6] * 4  # parts as equal as can be


def test_a_rank_marks_its_part_of_the_micro_step() -> None:
    """Ranks one after the other have what a single process has: here 4 ranks with half a sequence each."""
    whole_XT = marks(ids(48), Group(), 24, FREQUENCY_V)
    for rank in range(4):
        own_T = ids(48)[rank * 12 : rank * 12 + 12]
        own_XT = marks(own_T, Group((0, 1, 2, 3), rank), 24, FREQUENCY_V)
        assert torch.equal(own_XT, whole_XT[:, rank * 12 : rank * 12 + 12])


def test_drops_by_hand() -> None:
    """Two sequences of 4 tokens and C = 2: expert 0 loses tokens 2 and 5, expert 1 token 7."""
    routing = routing_of([[0], [0], [0], [1], [1], [0], [2], [1]], [[0.9]] * 8, num_experts=4)
    plan = plan_of(routing, capacity_factor=1.0)
    frequency_V = torch.tensor([0, 0, 6, 0, 0, 6, 0, 7])
    found = drops_of(plan, None, marks(torch.arange(8), Group(), 4, frequency_V))
    assert found.dropped_E.tolist() == [2, 1, 0, 0] and plan.over_P.tolist() == [2, 1, 0, 0]

    def few(counts: Tensor) -> dict[int, int]:
        return {place: count for place, count in enumerate(counts.tolist()) if count}

    assert few(found.dropped_S) == {8: 1, 4: 1, 12: 1}
    assert few(found.dropped_M) == {4: 1, 10: 1, 14: 1}
    assert few(found.dropped_F) == {6: 2, 7: 1} and few(found.load_F) == {0: 5, 6: 2, 7: 1}


def test_padding_is_not_dropped() -> None:
    routing = routing_of([[0]] * 6, [[0.9]] * 6, num_experts=2)
    mask_T = torch.tensor([True, True, True, True, False, False])
    step = StepContext(RandomKey.of("test"), real=RealTokens(mask_T, 4))
    plan = plan_of(routing, step, capacity_factor=1.0)
    found = drops_of(plan, step.real, marked(6, 6))
    assert found.dropped_E.tolist() == [2, 0] and found.dropped_S.nonzero().flatten().tolist() == [5, 8]
    assert_same(found, counted(plan, mask_T[:, None], 6))
    assert found.load_F.sum() == 4


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_a_drop_belongs_to_the_expert_that_the_router_chose(overflow: str) -> None:
    for seed in range(20):
        routing = random_routing(20, 4, 2, seed)
        plan = plan_of(routing, capacity_factor=0.5, overflow=overflow)
        found = drops_of(plan, None, marked(20, 5))
        expected = routing.experts_TK[~plan.kept_TK].bincount(minlength=4)
        assert torch.equal(found.dropped_E, expected) and expected.sum() == 40 - plan.kept_WE.sum()
        assert_same(found, counted(plan, torch.ones_like(plan.kept_TK), 5))


def stats_of(tokens: int = 24, phase: str = "train", seq_len: int | None = 8, **options: object) -> MoEStats:
    moe = MoEConfig(**({"num_experts": 4, "top_k": 2, "capacity_factor": 0.5} | options))
    router = ROUTERS[moe.router](moe, 8, Site(0), single_process_mesh())
    initialize(router, 0)
    x_TD = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
    marks_XT = None if seq_len is None else marked(tokens, seq_len)
    step = StepContext(RandomKey.of("test"), phase, seq_len=seq_len, marks_XT=marks_XT)
    routing = router(x_TD, step)
    plan = Capacity(moe, Site(0), Group())(routing, step)
    return MoEStats.of(Choice(routing, plan, routing.weights_TK), router, step, 0)


def test_statistics_of_a_layer() -> None:
    found = stats_of(capacity_pool=2)
    assert torch.equal(found.dropped_E, found.load_E - found.kept_E)
    assert torch.equal(found.over_P, found.dropped_E.view(2, 2).sum(1))
    drops = [found.dropped_E, found.dropped_S, found.dropped_M, found.dropped_F]
    assert {int(counts.sum()) for counts in drops} == {int(found.over_P.sum())} != {0}
    assert found.dropped_S[1::2].sum() == 0  # 8 tokens on 16 places: every other one
    assert found.dropped_M[-PLACES // 3 :].sum() > found.dropped_M[:2].sum() == 0  # the first come in
    assert torch.equal(found.load_F, 2 * FREQUENCY_V[ids(24)].bincount(minlength=FREQUENCIES))


def test_tokens_without_marks_are_counted_by_expert_alone() -> None:
    found = stats_of(seq_len=None)
    assert found.dropped_E.sum() > 0
    assert not any(counts.any() for counts in (found.dropped_S, found.dropped_M, found.dropped_F, found.load_F))


def test_who_refuses_nobody_drops_nothing() -> None:
    for options in ({"capacity_factor": None}, {"phase": "dropless"}, {"router": "expert_choice"}):
        found = stats_of(**options)
        assert found.dropped_E.tolist() == found.over_P.tolist() == [0] * 4
        assert found.dropped_S.tolist() == found.dropped_M.tolist() == [0] * PLACES
        assert found.dropped_F.tolist() == [0] * FREQUENCIES
        assert found.load_F.sum() == found.load_E.sum() == found.kept_E.sum() > 0


class Decisions:
    """A witness that believes everybody, and keeps what was decided."""

    def __init__(self) -> None:
        self.plans: list[tuple[Tensor, Tensor]] = []

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        return scores

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        self.plans.append((experts_TK, kept_TK))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_decoder_counts_each_decision_once(recompute: str) -> None:
    """Forward and backward: a block that is recomputed does not count again."""
    model = tiny_model(capacity_factor=0.6, recompute=recompute)
    tokens_BS, witness = ids(36).view(3, 12), Decisions()
    step = StepContext(RandomKey.of("test"), witness=witness, frequency_V=FREQUENCY_V)
    output = Decoder(model, single_process_mesh())(tokens_BS, tokens_BS, step)
    output.loss.backward()
    assert len(output.stats) == len(witness.plans) == 2
    for stats, (experts_TK, kept_TK) in zip(output.stats, witness.plans, strict=True):
        plan = DispatchPlan(experts_TK, kept_TK, stats.load_E[None], stats.kept_E[None], None, stats.over_P)
        expected = counted(plan, torch.ones_like(kept_TK), 12)
        assert expected.dropped_E.sum() > 0
        for name, counts in vars(expected).items():
            assert torch.equal(getattr(stats, name), counts), name
