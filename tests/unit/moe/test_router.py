"""What every router shares: which experts, with which weight, and what reaches its gradient."""

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.moe.choice import Routing
from moe_dist.moe.learning import learning_notes
from moe_dist.moe.router import Router
from moe_dist.moe.routers import ROUTERS, SoftmaxRouter
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import Site, StepContext
from tests.unit.helpers import context

T, D, E = 16, 8, 4


def router(kind: str = "softmax", top_k: int = 2, num_experts: int = E, d_model: int = D, **moe: object) -> Router:
    settings = MoEConfig(router=kind, top_k=top_k, num_experts=num_experts, **moe)
    made = ROUTERS[kind](settings, d_model, Site(0), single_process_mesh())
    initialize(made, seed=0)
    return made


def tokens(count: int = T) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1))


def routed(made: Router, x_TD: Tensor | None = None, *, chosen_TK: Tensor | None = None, **step: object) -> Routing:
    x_TD = tokens() if x_TD is None else x_TD
    step = {"token_ids_T": torch.arange(len(x_TD)) % 7} | step
    return made(x_TD, StepContext(context().key, **step), chosen_TK)


def probs(made: Router) -> Tensor:
    return (tokens() @ made.weight.t()).softmax(-1)


def test_by_hand() -> None:
    """Logits log(1, 2, 4, 1) are probabilities 1/8, 2/8, 4/8, 1/8; the best two, renormalised, are 2/3 and 1/3."""
    made = router(d_model=1)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0], [2.0], [4.0], [1.0]]).log())
    routing = routed(made, torch.ones(1, 1))
    torch.testing.assert_close(routing.stats.prob_sums_QE, torch.tensor([[1.0, 2.0, 4.0, 1.0]]) / 8)
    assert routing.experts_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[2.0, 1.0]]) / 3)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy", "sinkhorn"])
def test_top_1_is_never_renormalised(kind: str) -> None:
    for renormalize in (True, False):
        made = router(kind, top_k=1, renormalize=renormalize)
        routed(made).weights_TK.sum().backward()
        assert made.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sinkhorn"])
def test_top_1_is_renormalised_on_request_and_a_run_says_so(kind: str) -> None:
    made = router(kind, top_k=1, renormalize_top_1=True)
    weights_T1 = routed(made).weights_TK
    assert torch.equal(weights_T1, torch.ones(T, 1))
    weights_T1.sum().backward()
    assert made.weight.grad.abs().max() < 1e-6
    assert "the weight 1: no gradient" in "".join(learning_notes(ModelConfig(moe=made.moe)))
    assert list(learning_notes(ModelConfig(moe=router(kind, top_k=1).moe))) == []
    assert list(learning_notes(ModelConfig(moe=router(kind, top_k=2).moe))) == []


def test_top_k_weights() -> None:
    routing = routed(router(top_k=3))
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(T))
    made = router(top_k=3, renormalize=False, routed_scale=2.5)
    raw = routed(made)
    assert torch.equal(raw.experts_TK, routing.experts_TK)
    torch.testing.assert_close(raw.weights_TK, 2.5 * probs(made).gather(1, raw.experts_TK))
    assert (raw.weights_TK.diff(dim=-1) <= 0).all()  # best first
    assert (raw.experts_TK.sort(-1).values.diff(dim=-1) > 0).all()  # K different experts


def test_equal_scores_go_to_the_lower_number() -> None:
    made = router(top_k=2)
    with torch.no_grad():
        made.weight.zero_()
    assert routed(made).experts_TK.tolist() == [[0, 1]] * T


def test_renormalised_weights_bring_gradient_to_the_router() -> None:
    made = router(top_k=2)
    routed(made).weights_TK[:, 0].sum().backward()
    assert made.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "hash"])
def test_low_precision_tokens_are_routed_in_fp32(kind: str) -> None:
    made, x_TD = router(kind).bfloat16(), tokens().bfloat16()
    routing = routed(made, x_TD, phase="eval")
    assert {routing.logits_TE.dtype, routing.weights_TK.dtype, routing.stats.z_sum.dtype} == {torch.float32}
    assert torch.equal(routing.logits_TE, x_TD.float() @ made.weight.float().t())
    assert not torch.equal(routing.logits_TE, routing.logits_TE.bfloat16().float())


@pytest.mark.parametrize("kind", ROUTERS)
def test_float64_stays_float64(kind: str) -> None:
    assert routed(router(kind).double(), tokens().double()).weights_TK.dtype == torch.float64


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "expert_choice"])
def test_an_earlier_choice_is_repeated_with_todays_weights(kind: str) -> None:
    made, chosen_TK = router(kind), torch.tensor([[3, 0]]).expand(T, 2)
    first = routed(made)
    again = routed(made, chosen_TK=first.experts_TK)
    assert torch.equal(again.weights_TK, first.weights_TK)
    other = routed(made, chosen_TK=chosen_TK)
    assert torch.equal(other.experts_TK, chosen_TK)
    assert kind == "hash" or not torch.equal(other.weights_TK, first.weights_TK)


@pytest.mark.parametrize("kind", ROUTERS)
def test_statistics_are_sums_over_tokens(kind: str) -> None:
    routing = routed(router(kind), phase="eval")
    logits_TE, stats = routing.logits_TE, routing.stats
    score = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(-1)
    share = score / score.sum(-1, keepdim=True)
    torch.testing.assert_close(stats.prob_sums_QE, share.sum(0, keepdim=True))
    torch.testing.assert_close(stats.z_sum, logits_TE.logsumexp(-1).square().sum())
    torch.testing.assert_close(stats.entropy_sum, -(share * share.log()).sum())
    assert stats.counts_QE.tolist() == [routing.experts_TK.flatten().bincount(minlength=E).tolist()]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_witness_sees_the_scores_and_may_settle_them(kind: str) -> None:
    class Reversing:
        def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
            assert (site, what) == (Site(0), "router")
            return -scores

    made = router(kind)
    honest, settled = routed(made), routed(made, witness=Reversing())
    worst_TK = honest.logits_TE.sort(dim=-1).indices[:, :2]
    assert torch.equal(settled.experts_TK, worst_TK)


def test_softmax_is_the_default() -> None:
    assert isinstance(router(), SoftmaxRouter) and MoEConfig().router == "softmax"
