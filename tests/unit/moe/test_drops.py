"""Where drops are counted: at the expert that the router chose, and at the place in the sequence."""

import torch

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice
from moe_dist.moe.drops import PLACES, places, where_dropped
from moe_dist.moe.losses import MoEStats
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import RealTokens, Site, StepContext
from tests.unit.moe.test_capacity import plan_of, random_routing, routing_of

CPU = torch.device("cpu")


def test_places_by_hand() -> None:
    assert places(4, 30, 32, CPU).tolist() == [15, 15, 0, 0]
    assert places(4, 0, 4, CPU).tolist() == [0, 4, 8, 12]
    assert places(3, 15, 16, CPU).tolist() == [15, 0, 1]
    assert places(100, 0, 100, CPU).bincount().tolist() == [7, 6, 6, 6] * 4  # parts as equal as can be


def test_drops_by_hand() -> None:
    """Two sequences of 4 tokens and C = 2: expert 0 loses tokens 2 and 5, expert 1 token 7."""
    routing = routing_of([[0], [0], [0], [1], [1], [0], [2], [1]], [[0.9]] * 8, num_experts=4)
    plan = plan_of(routing, capacity_factor=1.0)
    dropped_E, dropped_S = where_dropped(plan, None, places(8, 0, 4, CPU))
    assert dropped_E.tolist() == [2, 1, 0, 0] and plan.over_P.tolist() == [2, 1, 0, 0]
    assert {place: count for place, count in enumerate(dropped_S.tolist()) if count} == {8: 1, 4: 1, 12: 1}


def test_padding_is_not_dropped() -> None:
    routing = routing_of([[0]] * 6, [[0.9]] * 6, num_experts=2)
    mask_T = torch.tensor([True, True, True, True, False, False])
    step = StepContext(RandomKey.of("test"), real=RealTokens(mask_T, 4))
    plan = plan_of(routing, step, capacity_factor=1.0)
    dropped_E, dropped_S = where_dropped(plan, step.real, places(6, 0, 6, CPU))
    assert dropped_E.tolist() == [2, 0] and dropped_S.nonzero().flatten().tolist() == [5, 8]


def test_a_drop_belongs_to_the_expert_that_the_router_chose() -> None:
    for seed in range(20):
        routing = random_routing(20, 4, 2, seed)
        plan = plan_of(routing, capacity_factor=0.5, overflow="reroute")
        dropped_E, dropped_S = where_dropped(plan, None, places(20, 0, 20, CPU))
        expected = routing.experts_TK[~plan.kept_TK].bincount(minlength=4)
        assert torch.equal(dropped_E, expected) and dropped_S.sum() == expected.sum() == 40 - plan.kept_WE.sum()


def stats_of(tokens: int = 24, phase: str = "train", seq_len: int | None = 8, **options: object) -> MoEStats:
    moe = MoEConfig(**({"num_experts": 4, "top_k": 2, "capacity_factor": 0.5} | options))
    router = ROUTERS[moe.router](moe, 8, Site(0), single_process_mesh())
    initialize(router, 0)
    x_TD = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
    step = StepContext(RandomKey.of("test"), phase, seq_len=seq_len)
    routing = router(x_TD, step)
    plan = Capacity(moe, Site(0), Group())(routing, step)
    return MoEStats.of(Choice(routing, plan, routing.weights_TK), router, step, 0)


def test_statistics_of_a_layer() -> None:
    found = stats_of(capacity_pool=2)
    assert found.dropped_E.sum() == found.dropped_S.sum() == (found.load_E - found.kept_E).sum() > 0
    assert torch.equal(found.dropped_E, found.load_E - found.kept_E)
    assert torch.equal(found.over_P, found.dropped_E.view(2, 2).sum(1))
    assert found.dropped_S[1::2].sum() == 0  # 8 tokens on 16 places: every other one
    assert stats_of(seq_len=None).dropped_S[-PLACES // 3 :].sum() > stats_of(seq_len=None).dropped_S[:2].sum()


def test_who_refuses_nobody_drops_nothing() -> None:
    for options in ({"capacity_factor": None}, {"phase": "dropless"}, {"router": "expert_choice"}):
        found = stats_of(**options)
        assert found.dropped_E.tolist() == found.over_P.tolist() == [0] * 4
        assert found.dropped_S.tolist() == [0] * PLACES
