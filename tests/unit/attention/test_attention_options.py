"""What model.attention offers the trainer, each against a loop over heads and positions in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.attention.alibi import alibi_slopes
from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.positions import Positions
from moe_dist.config.model import AttentionConfig
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from tests.unit.helpers import context, tiny_model

D, H, P, S = 16, 4, 4, 9
OPTIONS = {
    "clip": dict(clip_qkv=0.5),
    "qk_ln": dict(qk_ln=True),
    "biases": dict(qkv_bias=True, out_bias=True, clip_qkv=0.5),
    "head norm": dict(qk_norm="head", clip_qkv=0.5),
    "width norm": dict(qk_norm="width", clip_qkv=0.5),
    "window": dict(window=3),
    "sinks": dict(sinks=True),
    "alibi": dict(position="alibi"),
    "all": dict(clip_qkv=0.5, qk_ln=True, window=3, sinks=True, position="alibi"),
}


def layer_of(backend: str, groups: int, options: dict[str, object]) -> CausalSelfAttention:
    config = AttentionConfig(backend=backend, **({"position": "none"} | options))
    model = tiny_model(num_heads=H, num_kv_heads=groups, attention=config)
    layer = CausalSelfAttention(model.head_sizes, model.attention, single_process_mesh())
    initialize(layer, seed=0)
    for name, param in layer.named_parameters():
        if "qk_norm" in name or "sinks" in name or "bias" in name:
            torch.nn.init.normal_(param)
    return layer.double()


def over_heads(t_BSHP: Tensor, weight: Tensor, over: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * g, of each head or of all of them together."""
    t = t_BSHP if over == "head" else t_BSHP.flatten(2)
    return (t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).view_as(t_BSHP)


def by_positions(layer: CausalSelfAttention, x_BSD: Tensor, groups: int) -> Tensor:
    config, norm = layer.config, layer.qk_norm
    q_bias, kv_bias = (layer.query.bias, layer.key_value.bias) if config.qkv_bias else (0.0, 0.0)
    q = (x_BSD @ layer.query.weight.t() + q_bias).unflatten(-1, (H, P))
    kv = (x_BSD @ layer.key_value.weight.t() + kv_bias).unflatten(-1, (groups, 2, P))
    k, v = kv[..., 0, :], kv[..., 1, :]
    if config.qk_norm != "none":  # before they are clamped
        q, k = (over_heads(t, weight, config.qk_norm) for t, weight in ((q, norm.query_weight), (k, norm.key_weight)))
    if config.clip_qkv:
        q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
    if config.qk_ln:
        q = F.layer_norm(q.flatten(2), (H * P,), norm.query_weight, norm.query_bias, 1e-5).view_as(q)
        k = F.layer_norm(k, (P,), norm.key_weight, norm.key_bias, 1e-5)
    slopes, out = alibi_slopes(H).double(), torch.zeros_like(x_BSD)
    if config.out_bias:
        out = out + layer.out_bias.bias
    for b, h, t in product(range(len(x_BSD)), range(H), range(S)):
        first, group = max(0, t + 1 - (config.window or S)), h * groups // H
        scores = k[b, first : t + 1, group] @ q[b, t, h] / P**0.5
        if config.position == "alibi":
            scores = scores - slopes[h] * (t - torch.arange(first, t + 1))
        e = scores.exp()
        total = e.sum() + (layer.sinks_H[h].exp() if config.sinks else 0)
        out[b, t] += (e / total) @ v[b, first : t + 1, group] @ layer.out.weight[h * P : (h + 1) * P]
    return out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("name", OPTIONS)
def test_against_a_loop_with_all_gradients(name: str, backend: str, groups: int) -> None:
    layer = layer_of(backend, groups, OPTIONS[name])
    x_BSD = torch.randn(2, S, D, dtype=torch.float64, requires_grad=True)
    positions = Positions(slopes_H=alibi_slopes(H).double() if layer.config.position == "alibi" else None)
    found = layer(x_BSD.flatten(0, 1), (2, S), positions, context())[0].view_as(x_BSD)
    expected = by_positions(layer, x_BSD, groups)
    torch.testing.assert_close(found, expected)
    weight, leaves = torch.randn_like(found), [x_BSD, *layer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_dropout_is_for_training_and_the_same_again() -> None:
    layer, x_TD = layer_of("torch", 1, dict(dropout=0.4)), torch.randn(2 * S, D, dtype=torch.float64)

    def out(*key: int, phase: str = "train") -> Tensor:
        return layer(x_TD, (2, S), Positions(), context(*key, phase=phase))[0]

    assert out(1).equal(out(1)) and not out(1).equal(out(2))
    assert out(1, phase="eval").equal(out(2, phase="eval"))
    layer.layer = 1
    assert not out(1).equal(layer_of("torch", 1, dict(dropout=0.4))(x_TD, (2, S), Positions(), context(1))[0])
