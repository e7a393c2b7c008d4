"""A million random assignments: what each expert keeps is min(n, C), and nothing is lost or counted twice."""

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.top_k.reference import top_k_experts
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Routing
from moe_dist.parallel.mesh import Group
from moe_dist.step import Site
from tests.unit.helpers import context

T, K, E = 500_000, 2, 64


def crowded_routing() -> Routing:
    """Distinct experts for each token; some are wanted far more often than others."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(T, E, generator=generator) + torch.linspace(-1, 1, E)
    stats = top_k_experts(logits_TE, K)
    return Routing(stats.experts_TK, stats.scores_TK, logits_TE, None, stats)


ROUTING = crowded_routing()


def who_stays(policy: str, expert: int, capacity: int, kept_N: Tensor) -> Tensor:
    """[N] mask by sorting the assignments of one expert; for random, whoever the rule took."""
    mine_n = (ROUTING.experts_TK.flatten() == expert).nonzero().flatten()
    if policy == "random":
        return kept_N & (ROUTING.experts_TK.flatten() == expert)
    if policy == "score":
        mine_n = mine_n[ROUTING.weights_TK.flatten()[mine_n].argsort(descending=True, stable=True)]
    return torch.zeros_like(kept_N).index_fill(0, mine_n[:capacity], True)


@pytest.mark.parametrize("policy", ["position", "score", "random"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_each_expert_keeps_the_smaller_of_its_load_and_c(factor: float, policy: str) -> None:
    moe = MoEConfig(num_experts=E, top_k=K, capacity_factor=factor, drop_policy=policy)
    plan = Capacity(moe, Site(0), Group())(ROUTING, context())
    load_E = ROUTING.experts_TK.flatten().bincount(minlength=E)
    assert plan.capacity == {1.0: 15_625, 0.5: 7_813}[factor]  # ceil(factor * 1,000,000 / 64)
    assert torch.equal(plan.counts_WE[0], load_E)
    assert torch.equal(plan.kept_WE[0], load_E.clamp(max=plan.capacity))
    assert 0 < (load_E > plan.capacity).sum() < E  # some overflow, some do not
    kept_N = plan.kept_TK.flatten()
    assert torch.equal(ROUTING.experts_TK.flatten()[kept_N].bincount(minlength=E), plan.kept_WE[0])
    assert int(kept_N.sum()) + int((~kept_N).sum()) == T * K == 1_000_000
    assert int(plan.kept_WE.sum()) == int(kept_N.sum())
    for expert in (0, 31, 63):
        mine_N = ROUTING.experts_TK.flatten() == expert
        assert torch.equal(kept_N & mine_N, who_stays(policy, expert, plan.capacity, kept_N))
    if policy == "random":
        again = Capacity(moe, Site(0), Group())(ROUTING, context(1)).kept_TK
        assert not torch.equal(again, plan.kept_TK)
        # Of the fullest expert both halves of the tokens lose about as many.
        full_N = ROUTING.experts_TK.flatten() == int(load_E.argmax())
        shares = [kept_N[half][full_N[half]].double().mean() for half in (slice(0, T), slice(T, 2 * T))]
        assert abs(float(shares[0] - shares[1])) < 0.02


def test_dropless_keeps_a_million() -> None:
    plan = Capacity(MoEConfig(num_experts=E, top_k=K, capacity_factor=None), Site(0), Group())(ROUTING, context())
    assert plan.capacity is None
    assert int(plan.kept_TK.sum()) == int(plan.kept_WE.sum()) == 1_000_000
