"""Routed attention against the loops of routed_by_hand.py, and what it must not see: the future, other sequences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist import MixtureOfAutoregressiveAttention
from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.local import local_attention
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.attention.routed import RoutedSelfAttention
from moe_dist.config.model import AttentionConfig, HeadSizes, RoutedAttentionConfig
from moe_dist.config.validate import validate
from moe_dist.kernels.attention import reference
from moe_dist.kernels.attention.pattern import Pattern
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from tests.dist.helpers import tiny_config
from tests.unit.attention.routed_by_hand import routed_by_hand
from tests.unit.helpers import context, gradients

D, W = 12, 4


def layer_of(seed: int = 0, **options: object) -> MixtureOfAutoregressiveAttention:
    settings = dict(num_routed_queries=2, num_routed_key_values=3, local_attn_window_size=W, dim_head=4, heads=2)
    return MixtureOfAutoregressiveAttention(D, **(settings | options), seed=seed).double()


def draw(seed: int, batch: int = 2, length: int = 15) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(layer: MixtureOfAutoregressiveAttention, x: Tensor) -> Tensor:
    return F.rms_norm(x, (D,), layer.norm.weight, 1e-5)


CASES = {
    "plain": dict(),
    "as published": dict(causal_routing=False, cosine_routing=False),
    "one local token, wide windows": dict(local_attn_window_size=1, routed_window_size=6),
    "narrow windows, more keys than the first holds": dict(routed_window_size=2, num_routed_key_values=5),
    "the same, as published": dict(routed_window_size=3, num_routed_key_values=7, causal_routing=False),
    "all queries": dict(num_routed_queries=W + 1),
    "all queries, as published": dict(num_routed_queries=W, causal_routing=False),
    "mean": dict(average_routed=True, num_experts=3),
    "mean, as published": dict(average_routed=True, causal_routing=False),
    "plain maths, no norm, one expert": dict(flash_attn=False, prenorm=False, num_experts=1),
}


@pytest.mark.parametrize("name", CASES)
def test_against_loops(name: str) -> None:
    """Outputs and all gradients, for whole windows, an open one, and a sequence that is not routed."""
    for length, turns in ((15, None), (12, 1), (14, 2), (3, None)):
        layer, x = layer_of(**CASES[name]), draw(length, length=length).requires_grad_()
        angles = None if turns is None else torch.randn(length, turns, 4, dtype=torch.float64)
        y = layer(x, None if angles is None else angles.flatten(1))
        expected = routed_by_hand(
            layer.attention, normed(layer, x) if layer.norm.__class__.__name__ == "RMSNorm" else x, angles
        )
        torch.testing.assert_close(y, expected)
        pull = torch.randn_like(y)
        inputs = [x, *layer.parameters()]
        ours, theirs = (torch.autograd.grad(t, inputs, pull, allow_unused=True) for t in (y, expected))
        for a, b in zip(ours, theirs, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if a is None else a.norm(), zero if b is None else b.norm(), check_dtype=False
            )
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_other_numbers_of_routed_tokens() -> None:
    layer, x = layer_of(), draw(0)
    for queries, key_values in ((1, 7), (3, 1)):
        y = layer(x, num_routed_queries=queries, num_routed_key_values=key_values)
        torch.testing.assert_close(y, routed_by_hand(layer.attention, normed(layer, x), None, queries, key_values))


def later_tokens_matter(seed: int, **options: object) -> bool:
    """Whether an output before t changes when what comes from t on does."""
    layer, x = layer_of(seed, **options), draw(seed, length=18)
    t = 1 + seed % 17
    other = torch.cat((x[:, :t], draw(seed + 1000, length=18)[:, t:]), dim=1)
    return not torch.allclose(layer(x)[:, :t], layer(other)[:, :t], rtol=0, atol=1e-10)


def test_no_output_depends_on_a_later_token() -> None:
    for seed in range(50):
        assert not later_tokens_matter(seed, average_routed=bool(seed % 2), routed_window_size=3 + seed % 3)


def test_published_routing_looks_ahead() -> None:
    assert sum(later_tokens_matter(seed, causal_routing=False) for seed in range(50)) > 10


@pytest.mark.parametrize(
    "options", [dict(), dict(average_routed=True), dict(num_routed_queries=W), dict(num_routed_key_values=9)]
)
def test_a_prefix_gives_the_same(options: dict[str, object]) -> None:
    for seed in range(4):
        layer, x = layer_of(seed, **options), draw(seed, length=19)
        whole = layer(x)
        for length in range(1, 20):
            torch.testing.assert_close(layer(x[:, :length]), whole[:, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_of_a_batch_do_not_meet(causal: bool) -> None:
    layer = layer_of(causal_routing=causal)
    x = draw(0, batch=3).requires_grad_()
    other = x.detach().clone()
    other[0], other[2] = draw(1, batch=1)[0] * 5, 0.0
    y = layer(x)
    assert torch.equal(layer(other)[1], y[1])
    (grad,) = torch.autograd.grad(y[1].square().sum(), x)
    assert not grad[0].any() and not grad[2].any() and grad[1].any()


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_reach_all_routing_tokens(causal: bool) -> None:
    layer = MixtureOfAutoregressiveAttention(512, 5, 5, 32, causal_routing=causal, seed=0)
    layer(torch.randn(10, 60, 512)).square().sum().backward()
    grads = gradients(layer)
    for side in ("query", "key_value"):
        assert (grads[f"attention.routers.{side}"].norm(dim=1) > 0).all()


def test_bfloat16() -> None:
    """Routing sees the same numbers in both, so the same tokens are chosen."""
    for causal in (True, False):
        half = MixtureOfAutoregressiveAttention(
            64, 8, 8, 16, dim_head=16, prenorm=False, causal_routing=causal, seed=0
        ).bfloat16()
        wide = MixtureOfAutoregressiveAttention(64, 8, 8, 16, dim_head=16, prenorm=False, causal_routing=causal, seed=0)
        wide.load_state_dict(half.state_dict())
        x, angles = torch.randn(3, 60, 64).bfloat16(), torch.randn(60, 16)
        y, expected = half(x, angles), wide(x.float(), angles)
        assert y.dtype == torch.bfloat16
        assert ((y.float() - expected).norm() / expected.norm()).item() < 2e-2
        y.sum().backward()
        assert all(grad.isfinite().all() for grad in gradients(half).values())


def test_triton_descent_gives_the_same() -> None:
    x = torch.randn(2, 40, 32)
    torch_, triton = (
        MixtureOfAutoregressiveAttention(32, 3, 3, 8, heads=2, use_triton=t, seed=0) for t in (False, True)
    )
    y, expected = triton(x), torch_(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), b in zip(gradients(triton).items(), gradients(torch_).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3 * float(b.abs().max()), msg=name)


def test_the_documents_examples() -> None:
    attention_layer = MixtureOfAutoregressiveAttention(
        dim=512, num_routed_queries=5, num_routed_key_values=5, local_attn_window_size=32
    )
    x = torch.randn(10, 60, 512)
    rotary_emb = torch.randn(60, 512)
    first, turned = attention_layer(x), attention_layer(x, rotary_emb=rotary_emb)
    other = attention_layer(x, num_routed_queries=3, num_routed_key_values=7)
    assert first.shape == turned.shape == other.shape == x.shape
    assert not torch.equal(first, turned) and not torch.equal(first, other)


def test_dropout_is_for_training() -> None:
    layer, x = layer_of(dropout=0.5, flash_attn=False), draw(0)
    torch.testing.assert_close(layer.eval()(x), layer_of()(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.allclose(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


def test_mistakes_of_the_document_layer() -> None:
    layer, x = layer_of(), draw(0)
    for shape in ((15, 5), (14, 4), (15, 16), (1, 15, 4)):
        with pytest.raises(ValueError, match=r"\[15, 4\], or of all heads, \[15, 8\]"):
            layer(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="dim=12"):
        layer(torch.zeros(2, 3, 13))
    with pytest.raises(ValueError, match="num_routed_queries=0"):
        layer(x, num_routed_queries=0)
    for options in (dict(heads=0), dict(routed_window_size=0), dict(dropout=1.0), dict(dim_head=3)):
        with pytest.raises(ValueError, match=next(iter(options))):
            layer_of(**options)
    with pytest.raises(TypeError, match="windows"):
        layer_of(windows=3)


@pytest.mark.parametrize("window", [1, 3, 4, 30])
@pytest.mark.parametrize("length", [1, 4, 8, 13])
def test_local_attention_is_a_window_of_one_more(window: int, length: int) -> None:
    q, k, v = (torch.randn(2, length, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    y = local_attention(q, k, v, reference.attend, window)
    whole = reference.attend(*(t.transpose(1, 2) for t in (q, k, v)), Pattern(window=window + 1)).transpose(1, 2)
    torch.testing.assert_close(y, whole)


def trainer_layer(kv_heads: int, backend: str = "torch", **routed: object) -> RoutedSelfAttention:
    settings = dict(num_routed_queries=2, num_routed_key_values=3, local_window=W) | routed
    config = AttentionConfig(kind="routed", backend=backend, routed=RoutedAttentionConfig(**settings))
    layer = RoutedSelfAttention(HeadSizes(D, 4, kv_heads, 4), config, single_process_mesh(), 0, "torch", 0.3)
    initialize(layer, seed=0)
    return layer.double()


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_trainer_layer_against_loops(kv_heads: int, backend: str) -> None:
    layer, x = trainer_layer(kv_heads, backend, num_routed_key_values=5), draw(0)
    table = rotary_table(torch.arange(15).double(), 4, 100.0)
    positions = Positions(rotary=tuple(t[None] for t in table))
    y, stats = layer(x.flatten(0, 1), (2, 15), positions, context())
    angles = torch.arange(15)[:, None, None].double() * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(y.view_as(x), routed_by_hand(layer.routed, x, angles))
    assert stats is None
    of_rows = Positions(rotary=tuple(t[None].repeat(2, 1, 1) for t in table))
    torch.testing.assert_close(layer(x.flatten(0, 1), (2, 15), of_rows, context())[0], y)


def test_mistakes_of_the_trainer_layer() -> None:
    layer, x_TD = trainer_layer(1), draw(0).flatten(0, 1)
    wrong = {
        "no cache": (Positions(), KVCache(2, 15, 1, 4)),
        "no ALiBi": (Positions(slopes_H=torch.ones(4)), None),
        "no mask": (Positions(bias=torch.zeros(1, 1, 15, 15)), None),
    }
    for message, (positions, cache) in wrong.items():
        with pytest.raises(ValueError, match=message.replace("no mask", "takes no mask")):
            layer(x_TD, (2, 15), positions, context(), cache)


def test_rules() -> None:
    def problems(**changes: object) -> str:
        settings = {f"model__attention__{name}": value for name, value in changes.items()}
        try:
            validate(tiny_config(**({"model__attention__kind": "routed", "train__seq_len": 256} | settings)), 1)
        except ValueError as error:
            return str(error)
        return ""

    assert problems() == ""
    assert "num_routed_queries=0" in problems(routed={"num_routed_queries": 0})
    assert "seq_len=256 is not above local_window=256" in problems(routed={"local_window": 256})
    assert "ALiBi" in problems(position="alibi")
    for name, value in (("window", 4), ("sinks", True), ("qk_norm", "head"), ("clip_qkv", 1.0), ("out_bias", True)):
        assert f"model.attention.{name} to" in problems(**{name: value})
    assert "is of kind=routed, not multi_query" in problems(kind="multi_query", routed={"num_experts": 0})
