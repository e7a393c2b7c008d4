"""What is said of a configuration, and whether it is true of the capacity rule."""

import pytest
import torch

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.causality import causality_notes
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import Site
from tests.unit.helpers import context

CAUSAL = [
    {},
    {"capacity_factor": None, "drop_policy": "score"},
    {"router": "sigmoid"},
    {"router": "sinkhorn", "capacity_factor": None},
    {"drop_order": "choice"},
    {"drop_order": "choice", "top_k": 1},
    {"drop_policy": "score"},
    {"drop_policy": "random"},
    {"overflow": "reroute"},
    {"capacity_pool": 2},
    {"capacity_pool": 2, "pool_floor": 1.0},
    {"router": "expert_choice"},
]


@pytest.mark.parametrize("changes", CAUSAL, ids=str)
def test_a_note_is_given_exactly_where_a_later_token_matters(changes: dict) -> None:
    """C is held fixed while a token after position t changes: does anything up to t?"""
    moe = MoEConfig(**({"num_experts": 4, "top_k": 2, "capacity_factor": 0.6} | changes))
    router = ROUTERS[moe.router](moe, 8, Site(0), single_process_mesh())
    initialize(router, 0)
    rule, changed = Capacity(moe, Site(0), Group()), False
    for seed in range(30):
        x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
        other_TD = x_TD.clone()
        other_TD[9:] = torch.randn(3, 8, generator=torch.Generator().manual_seed(1000 + seed))
        placed = []
        for tokens_TD in (x_TD, other_TD):
            plan = rule(router(tokens_TD, context()), context())
            placed.append(torch.where(plan.kept_TK, plan.experts_TK, -1)[:9])
        changed = changed or not torch.equal(*placed)
    assert changed == bool(list(causality_notes(ModelConfig(moe=moe))))


def test_a_dense_model_needs_no_note() -> None:
    assert list(causality_notes(ModelConfig(moe=MoEConfig(num_experts=0, drop_policy="score")))) == []
