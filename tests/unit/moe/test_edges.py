"""Where layers break in other people's models: copies, casts, autocast, recomputation, nothing to do, wrong options."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist import MixtureOfExperts
from moe_dist.config.model import MoEConfig
from moe_dist.models.block import moe_layer
from moe_dist.moe.layer import MoE
from moe_dist.moe.routers import ROUTERS
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import StepContext
from tests.unit.helpers import context, tiny_model

D = 16


def mixture(**options: Any) -> MixtureOfExperts:
    return MixtureOfExperts(D, 24, **({"num_experts": 4, "top_k": 2, "seed": 0} | options))


def layer_of(**changes: object) -> MoE:
    layer = moe_layer(tiny_model(**changes), 0, single_process_mesh())
    initialize(layer, 0)
    return layer


def step(tokens: int, **more: Any) -> StepContext:
    return StepContext(context().key, token_ids_T=torch.arange(tokens), **more)


def test_a_copy_is_a_layer_like_the_first() -> None:
    first, x = mixture(dropout=0.0), torch.randn(5, D)
    average = copy.deepcopy(first)
    assert torch.equal(average.eval()(x), first.eval()(x))
    assert average.add_experts(1) == [4]
    assert average.num_experts == 5 and first.num_experts == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_balancing_bias_in_fp32(dtype: torch.dtype) -> None:
    layer = mixture(router="sigmoid", bias_update_rate=1e-3).to(dtype)
    for _ in range(1000):
        layer.moe.router.balance(torch.tensor([3, 1, 2, 2]))
    assert layer.moe.experts.w_up.dtype == dtype
    torch.testing.assert_close(layer.moe.router.bias_E, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    assert layer.double().moe.router.bias_E.dtype == torch.float64


def test_autocast_computes_low_and_routes_in_fp32() -> None:
    model, x = nn.Sequential(nn.Linear(D, D), mixture(dropout=0.0).eval(), nn.Linear(D, D)), torch.randn(64, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in model.parameters())
    alone = mixture(dropout=0.0).eval()
    experts_TK, expected = alone.moe.router(x, context()).experts_TK, alone(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(alone.moe.router(x, context()).experts_TK, experts_TK)
        torch.testing.assert_close(alone(x).float(), expected, rtol=2e-2, atol=2e-2)


def test_recomputation_draws_the_same_numbers_or_says_that_it_cannot() -> None:
    layer, x = mixture(dropout=0.5, router="sigmoid"), torch.randn(20, D)

    def grad(recompute: bool) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, step=3, use_reentrant=False) if recompute else layer(leaf, step=3)
        y.square().sum().backward()
        return leaf.grad

    torch.testing.assert_close(grad(True), grad(False))
    assert layer.loads.since_balance[0].load_E.sum() == 2 * 20 * 2  # two passes; the recomputation is not a third
    y = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(ValueError, match="run again inside a backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_hashing_does_not_depend_on_the_type_of_ids(dtype: torch.dtype) -> None:
    layer, x, ids = mixture(router="hash").eval(), torch.randn(100, D), torch.arange(100)
    expected = layer(x, token_ids=ids)
    assert torch.equal(layer(x, token_ids=ids.to(dtype)), expected)
    with pytest.raises(ValueError, match="an integer: give token_ids"):
        layer(x, token_ids=ids.float())


@pytest.mark.parametrize("router", ROUTERS)
def test_routed_scale_scales(router: str) -> None:
    x_TD, factor = torch.randn(9, D), {"capacity_factor": 1.0} if router == "expert_choice" else {}
    once, thrice = (layer_of(router=router, routed_scale=s, **factor)(x_TD, step(9))[0] for s in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("scope", ["global", "sequence", "local"])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_tokens(router: str, scope: str) -> None:
    layer = layer_of(router=router, balance_scope=scope, capacity_factor=1.0)
    for seq_len in (0, 4):
        y_TD, stats = layer(torch.zeros(0, D, requires_grad=True), step(0, seq_len=seq_len))
        assert y_TD.shape == (0, D) and stats.aux_loss.isfinite()
        (y_TD.sum() + stats.aux_loss).backward()
    assert all(param.grad is None or param.grad.isfinite().all() for param in layer.parameters())


def test_sigmoids_that_are_all_zero() -> None:
    layer = layer_of(router="sigmoid")
    with torch.no_grad():
        layer.router.weight.fill_(-30.0)
    y_TD, stats = layer(torch.ones(3, D), step(3))
    (y_TD.sum() + stats.aux_loss).backward()
    assert y_TD.isfinite().all() and layer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop_policy": "positon"}, "drop_policy: 'positon' is not one of 'position', 'score', 'random'"),
        ({"overflow": "rerout"}, "overflow"),
        ({"router": "softmx"}, "router"),
        ({"experts": "lop"}, "experts"),
        ({"top_k": 2.0}, "top_k: 2.0 is not an integer"),
        ({"expert_capacity_factor": float("inf")}, "capacity_factor"),
        ({"capacity_factor": 1.0}, "called expert_capacity_factor here"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"router": "expert_choice", "expert_capacity_factor": None}, "router=expert_choice needs a capacity_factor"),
        ({"router": "expert_choice", "expert_capacity_factor": [None]}, "router=expert_choice needs a capacity_factor"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mixture(**options)


def test_who_was_asked_in_vain_changes_no_weight() -> None:
    """Rerouting: a token whose second choice finds no place weighs its first one as it would when dropping."""
    x_TD = torch.randn(40, D)
    drop, reroute = (layer_of(overflow=o, capacity_factor=0.1, min_capacity=1) for o in ("drop", "reroute"))
    kept = {}
    for name, layer in (("drop", drop), ("reroute", reroute)):
        routing = layer.router(x_TD, context())
        plan = layer.gate.capacity(routing, context())
        weights_TK = layer.router.weigh_again(routing.weights_TK, routing.logits_TE, plan.experts_TK)
        kept[name] = torch.where(plan.kept_TK & (plan.experts_TK == routing.experts_TK), weights_TK, -1.0)
        lost_TK = ~plan.kept_TK
        assert torch.equal(plan.experts_TK[lost_TK], routing.experts_TK[lost_TK])
    assert MoEConfig().overflow == "drop" and (kept["drop"] >= 0).sum() > 0
    same = (kept["drop"] >= 0) & (kept["reroute"] >= 0) & (kept["reroute"] == kept["drop"])
    assert same.any()
