"""Moments after surgery follow gradients after surgery: those of real backward passes, before and after it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.surgery.layers import split_experts
from moe_dist.surgery.models import upcycle_decoder
from moe_dist.surgery.moments import of_copies, split_carried
from tests.unit.helpers import context, random_ids, tiny_model
from tests.unit.surgery.helpers import D, layer_of, run, tokens


def gradients(layer: MoE, x_TD: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    (run(layer, "train", x_TD)[0] * torch.linspace(-1, 1, D, dtype=x_TD.dtype)).sum().backward()
    return {name: param.grad.clone() for name, param in layer.named_parameters() if param.grad is not None}


def with_values(layer: MoE, values: dict[str, Tensor]) -> MoE:
    with torch.no_grad():
        for name, param in layer.named_parameters():
            param.copy_(values[name])
    return layer


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(renormalize=False), dict(router="sigmoid"), dict(router="sigmoid", renormalize=False),
     dict(top_k=1), dict(expert_bias=True, activation="gelu")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("parts", [2, 3])
def test_of_a_split_expert(changes: dict, parts: int) -> None:
    """exp_avg as the gradient, exp_avg_sq as its square; rows of the router on average over the parts."""
    x_TD = tokens(dtype=torch.float64)
    before = gradients(layer_of(**changes).double(), x_TD)
    split = layer_of(**changes).double()
    split_experts(split, parts)
    after = gradients(split, x_TD)
    for power in (1, 2):
        held = with_values(layer_of(**changes).double(), {name: grad**power for name, grad in before.items()})
        split_carried(held, parts, power)
        moments = dict(held.named_parameters())
        for name, grad in after.items():
            if name.startswith("router."):
                grad = grad.unflatten(0, (-1, parts)).mean(1).repeat_interleave(parts, 0)
            torch.testing.assert_close(moments[name].detach(), grad**power, rtol=1e-9, atol=1e-12)
    assert {name.partition(".")[0] for name in after} == {"router", "experts"}


@pytest.mark.parametrize("changes", [dict(), dict(top_k=4), dict(top_k=1), dict(router="sigmoid", top_k=1)], ids=str)
def test_of_copies(changes: dict) -> None:
    """Gradients of all copies add up to the dense one; each has its equal part of that."""
    dense = Decoder(tiny_model(num_experts=0), single_process_mesh(), seed=5).double()
    moe = replace(MoEConfig(num_experts=4, capacity_factor=None, z_loss_coef=0.0, balance="none"), **changes)
    copies, ids = upcycle_decoder(dense, moe), random_ids(4, 12)
    for model in (dense, copies):
        model(ids, ids, context()).loss.backward()
    for power in (1, 2):
        held = upcycle_decoder(dense, moe)  # of moments, in a model of the same shape
        for block, old, new in zip(held.blocks, dense.blocks, copies.blocks, strict=True):
            layer, dense_layer = block.feed_forward, old.feed_forward
            assert isinstance(layer, MoE)
            pairs = (("w_gate", dense_layer.gate), ("w_up", dense_layer.up), ("w_out", dense_layer.down))
            for name, linear in pairs:
                getattr(layer.experts, name).data.copy_(linear.weight.grad**power)
                together = getattr(new.feed_forward.experts, name).grad.sum(0)
                torch.testing.assert_close(together, linear.weight.grad, rtol=1e-5, atol=1e-7)
            of_copies(layer, 4, power)
            for name, linear in pairs:
                for value in getattr(layer.experts, name).detach():
                    torch.testing.assert_close(value, (linear.weight.grad / 4) ** power, rtol=1e-12, atol=0)
            assert bool((layer.router.weight == 0).all())
