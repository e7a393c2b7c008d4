"""There and back again: with experts that change nothing, a token returns as its kept weights times itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.config.schema import MoEConfig
from moe_dist.moe.capacity import Capacity, DispatchPlan
from moe_dist.moe.dispatch import Dispatcher, make_dispatcher
from moe_dist.moe.routing import Routing
from moe_dist.parallel.mesh import Group, Layout, single_process_mesh
from tests.unit.helpers import context, idle_mesh

KINDS = [("local", "ragged"), ("all_to_all", "ragged"), ("all_to_all", "padded")]
E = 5


@pytest.fixture(params=KINDS, ids=" ".join)
def dispatcher(request: pytest.FixtureRequest) -> Dispatcher:
    """Every kind on a single rank, where an exchange leaves rows where they are."""
    return make_dispatcher(*request.param, single_process_mesh())


def planned(tokens: int, top_k: int, factor: float | None, seed: int = 0) -> tuple[Tensor, Tensor, DispatchPlan]:
    """Random tokens and weights in float64, and a plan; expert 1 is never chosen."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    logits_TE[:, 1] = -100
    probs_TE = logits_TE.softmax(-1)
    experts_TK = probs_TE.topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    moe = MoEConfig(num_experts=E, top_k=top_k, capacity_factor=factor)
    plan = Capacity(moe, 0, Group())(Routing(logits_TE, probs_TE, experts_TK, weights_TK), context())
    return torch.randn(tokens, 3, generator=generator, dtype=torch.float64), weights_TK, plan


@pytest.mark.parametrize("factor", [None, 0.3, 0.8])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identity_experts(dispatcher: Dispatcher, top_k: int, factor: float | None) -> None:
    x_TD, weights_TK, plan = planned(11, top_k, factor)
    rows_RD, trip = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(rows_RD, weights_TK, trip)
    torch.testing.assert_close(y_TD, (weights_TK * plan.kept_TK).sum(-1, keepdim=True) * x_TD)
    assert plan.kept_TK.all() == (factor is None)


@pytest.mark.parametrize("factor", [None, 0.3])
def test_rows_lie_expert_after_expert(dispatcher: Dispatcher, factor: float | None) -> None:
    x_TD, _, plan = planned(11, 2, factor)
    rows_RD, trip = dispatcher.dispatch(x_TD, plan)
    expected = [x_TD[t] for e in range(E) for t in range(11) if (plan.kept_TK[t] & (plan.experts_TK[t] == e)).any()]
    assert torch.equal(rows_RD, torch.stack(expected))
    assert list(trip.rows_per_expert) == plan.experts_TK[plan.kept_TK].bincount(minlength=E).tolist()
    assert trip.rows_per_expert[1] == 0


@pytest.mark.parametrize("factor", [None, 0.3])
def test_distinct_experts_and_gradients(dispatcher: Dispatcher, factor: float | None) -> None:
    """Expert i multiplies by i + 2; the reference is a masked sum that never moves a row."""
    x_TD, weights_TK, plan = planned(7, 2, factor)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    rows_RD, trip = dispatcher.dispatch(x_TD, plan)
    scale_R = (torch.arange(E) + 2.0).double().repeat_interleave(torch.tensor(trip.rows_per_expert))
    y_TD = dispatcher.combine(rows_RD * scale_R[:, None], weights_TK, trip)
    expected = ((plan.experts_TK + 2) * plan.kept_TK * weights_TK).sum(-1, keepdim=True) * x_TD
    torch.testing.assert_close(y_TD, expected)
    weight_TD = torch.randn_like(y_TD)
    found = torch.autograd.grad((y_TD * weight_TD).sum(), (x_TD, weights_TK))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight_TD).sum(), (x_TD, weights_TK)))


def test_dropped_tokens_come_back_as_zero(dispatcher: Dispatcher) -> None:
    x_TD, weights_TK, plan = planned(12, 1, 0.3)
    rows_RD, trip = dispatcher.dispatch(x_TD, plan)
    y_TD = dispatcher.combine(rows_RD, weights_TK, trip)
    dropped_T = ~plan.kept_TK[:, 0]
    assert dropped_T.sum() >= 8  # C = ceil(0.3 * 12 / 5) = 1: at most 4 used experts keep one each
    assert torch.equal(y_TD[dropped_T], torch.zeros_like(y_TD[dropped_T]))
    assert y_TD[~dropped_T].abs().min() > 0


def test_nothing_kept(dispatcher: Dispatcher) -> None:
    x_TD, weights_TK, plan = planned(6, 2, 1.0)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    nothing = replace(plan, kept_TK=torch.zeros_like(plan.kept_TK), kept_WE=torch.zeros_like(plan.kept_WE))
    rows_RD, trip = dispatcher.dispatch(x_TD, nothing)
    assert rows_RD.shape == (0, 3)
    assert trip.rows_per_expert == (0,) * E
    y_TD = dispatcher.combine(rows_RD, weights_TK, trip)
    assert torch.equal(y_TD, torch.zeros(6, 3, dtype=torch.float64))
    y_TD.sum().backward()
    assert torch.equal(x_TD.grad, torch.zeros_like(x_TD))
    assert torch.equal(weights_TK.grad, torch.zeros_like(weights_TK))


def test_dispatchers_that_cannot_be_made() -> None:
    mesh = idle_mesh(Layout(world=2, ep=2), rank=0)
    with pytest.raises(ValueError, match="dispatch=local needs all experts on every rank, but ep=2"):
        make_dispatcher("local", "ragged", mesh)
    with pytest.raises(ValueError, match="unknown dispatch 'hierarchical'"):
        make_dispatcher("hierarchical", "ragged", mesh)
