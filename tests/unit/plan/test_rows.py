import numpy as np
import pytest

from moe_dist.config import MoEConfig
from moe_dist.plan.rows import rows_of, skew_of, skew_of_expert


@pytest.mark.parametrize(("experts", "ranks", "layers"), [(8, 8, 32), (128, 8, 8), (64, 4, 1)])
def test_the_fullest_rank_of_a_hundred_routings_stays_below(experts: int, ranks: int, layers: int) -> None:
    """Drawn without a formula: loads of experts that are any division of the rows, added up by rank and layer."""
    generator = np.random.default_rng(0)
    share_NLE = generator.dirichlet(np.ones(experts), size=(4000, layers))
    of_rank_NR = share_NLE.reshape(4000, layers, ranks, -1).sum((1, 3)) * ranks / layers
    skew = skew_of(MoEConfig(num_experts=experts, top_k=1), None, ranks, edp=1, layers=layers)
    exceeded = (of_rank_NR.max(1) > skew).mean()
    assert 0.0005 < exceeded < 0.05, (skew, exceeded)
    assert (of_rank_NR.max(1) > 1 + 0.6 * (skew - 1)).mean() > 0.05  # and it is not far above what happens


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_the_fullest_expert_of_a_hundred_routings_stays_below(experts: int) -> None:
    share_NE = np.random.default_rng(1).dirichlet(np.ones(experts), size=20000)
    skew = skew_of_expert(MoEConfig(num_experts=experts, top_k=1), None, 1)
    assert 0.005 < (experts * share_NE.max(1) > skew).mean() < 0.013


def test_no_rank_gets_more_than_there_is_or_is_let_in() -> None:
    eight = MoEConfig(num_experts=8, top_k=2)
    assert skew_of(eight, None, 2, 1) <= 2.0  # all rows to one of two ranks
    assert skew_of(eight, None, 8, 1) <= 4.0  # a token sends the one expert of a rank one of its two assignments
    assert skew_of(eight, 1.25, 8, 1) == 1.25 and skew_of(eight, 1.0, 8, 1) == 1.0
    assert skew_of(eight, 1.0, 4, 2) > 1.0  # under global scope one of two copies may be asked for more than the other
    assert skew_of(MoEConfig(num_experts=8, top_k=2, capacity_scope="local"), 1.0, 4, 2) == 1.0
    assert skew_of(eight, None, 1, 4) == skew_of(MoEConfig(num_experts=0), None, 1, 4) == 1.0


def test_rows_by_hand() -> None:
    """100 tokens of two choices for 8 experts on 4 ranks; half of the share is let in; a rank has 1.5 times its own."""
    rows = rows_of(MoEConfig(num_experts=8, top_k=2), 0.5, 100, expert_ranks=4, etp=1, skew=1.5, skew_of_one=2.0)
    assert (rows.asked, rows.sent, rows.arrived, rows.fullest) == (200, 100, 150, 100)
    cut = rows_of(MoEConfig(num_experts=8, top_k=2), None, 100, expert_ranks=4, etp=2, skew=1.0, skew_of_one=1.0)
    assert (cut.sent, cut.arrived, cut.fullest) == (400, 400, 100)  # every row goes to both halves of its expert
