"""`MultiQueryAttention` against its definition, plain torch and other libraries; implementations among themselves."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist import MultiQueryAttention
from moe_dist.attention.alibi import alibi_bias
from tests.unit.standalone.multi_query.helpers import (
    FUSED,
    HEADS,
    IMPLS,
    OPTIONS,
    D,
    by_heads,
    layer_of,
    precise,
    results,
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["torch", "flash"])
def test_is_its_definition(impl: str, options: dict[str, Any], causal: bool) -> None:
    dtype, atol = precise(impl)
    layer, x = layer_of(impl, **options), torch.randn(2, 7, D, dtype=torch.float64)
    bias = torch.randn(HEADS, 7, 7, dtype=torch.float64)
    expected = by_heads(layer, x, causal, bias)
    y, weights, past = layer.to(dtype)(x.to(dtype), bias=bias.to(dtype), causal=causal)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)
    assert weights is None and past is None


def tied(layer: MultiQueryAttention) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of query, key and value of multi-head attention whose heads all have the same keys."""
    sizes, (weight, bias) = [D, D // HEADS, D // HEADS], (layer.Wqkv.weight, layer.Wqkv.bias)
    weights, biases = list(weight.split(sizes)), list(bias.split(sizes))
    return (
        [weights[0], *(w.repeat(HEADS, 1) for w in weights[1:])],
        [biases[0], *(b.repeat(HEADS) for b in biases[1:])],
    )


def multi_head(layer: MultiQueryAttention, x_BSD: Tensor) -> Tensor:
    """Multi-head attention in plain torch, as the textbook has it."""
    batch, length, _ = x_BSD.shape
    q, k, v = (
        F.linear(x_BSD, weight, bias).view(batch, length, HEADS, -1).transpose(1, 2)
        for weight, bias in zip(*tied(layer), strict=True)
    )
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * (D // HEADS) ** -0.5).masked_fill(future, -torch.inf)
    heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, D)
    return F.linear(heads, layer.out_proj.weight, layer.out_proj.bias)


def test_is_multi_head_attention_with_tied_keys_and_values() -> None:
    """No difference in float64, nor of gradients; in fp32 below 1e-6 from torch's fused attention.

    The inputs of the projections have few bits, so these are exact whatever the shape of the matrix product."""
    layer, x = layer_of(), torch.randint(-16, 17, (3, 9, D)).double() / 8
    with torch.no_grad():
        for param in layer.Wqkv.parameters():
            param.copy_((param * 16).round() / 16)
    y, params = layer(x)[0], list(layer.parameters())
    expected = multi_head(layer, x)
    assert (y - expected).abs().max() == 0
    found, wanted = (torch.autograd.grad(out.square().sum(), params) for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    layer, x = layer.float(), x.float()
    q, k, v = (
        F.linear(x, weight, bias).view(3, 9, HEADS, -1).transpose(1, 2)
        for weight, bias in zip(*tied(layer), strict=True)
    )
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert (layer(x)[0] - layer.out_proj(heads)).abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_is_torchs_multi_head_attention(impl: str) -> None:
    """nn.MultiheadAttention with the tied weights; its weights too."""
    layer, x = layer_of(impl, torch.float32), torch.randn(2, 6, D)
    other = torch.nn.MultiheadAttention(D, HEADS, batch_first=True)
    weights, biases = tied(layer)
    state = {"in_proj_weight": torch.cat(weights), "in_proj_bias": torch.cat(biases)}
    other.load_state_dict(state | {f"out_proj.{n}": p for n, p in layer.out_proj.named_parameters()})
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, expected_weights = other(x, x, x, attn_mask=future, average_attn_weights=False)
    y, found, _ = layer(x, needs_weights=impl == "torch")
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    assert found is None or (found - expected_weights).abs().max() < 1e-6


def test_is_the_attention_of_gpt_bigcode() -> None:
    module = pytest.importorskip("transformers.models.gpt_bigcode.modeling_gpt_bigcode")
    layer, x = layer_of(dtype=torch.float32), torch.randn(2, 6, D)
    config = module.GPTBigCodeConfig(n_embd=D, n_head=HEADS, multi_query=True, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    other = module.GPTBigCodeAttention(config)
    other.c_attn.load_state_dict(layer.Wqkv.state_dict())
    other.c_proj.load_state_dict(layer.out_proj.state_dict())
    y, weights, _ = layer(x, needs_weights=True)
    expected, expected_weights = other(x, attention_mask=torch.full((6, 6), -torch.inf).triu(1))
    torch.testing.assert_close((y, weights), (expected, expected_weights), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_is_the_attention_of_mpt(heads: int) -> None:
    """As many key/value heads as heads, ALiBi for any number of them, clipping; the same names in the state dict."""
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    config = mpt.MptConfig(d_model=D, n_heads=heads, attn_config={"clip_qkv": 0.6})
    other = mpt.MptAttention(config).double()
    layer = layer_of(heads=heads, num_kv_heads=heads, alibi=True, clip_qkv=0.6, use_bias=False)
    layer.load_state_dict(other.state_dict())
    x, future = torch.randn(2, 8, D, dtype=torch.float64), torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected = other(x, mpt.build_mpt_alibi_tensor(heads, 8), attention_mask=future)[0]
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)  # its softmax is in fp32


CALLS: list[dict[str, Any]] = [
    dict(),
    dict(causal=False),
    dict(attention_mask=torch.tensor([[0, 0, 1, 1, 1, 0, 1], [0] * 7]), bias=torch.randn(7, 7)),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", FUSED)
def test_implementations_agree(impl: str, options: dict[str, Any], call: dict[str, Any]) -> None:
    """Outputs and all gradients, from one state dict."""
    dtype, atol = precise(impl)
    plain, fused = (layer_of(name, dtype, **options) for name in ("torch", impl))
    assert plain.state_dict().keys() == fused.state_dict().keys()
    fused.load_state_dict(plain.state_dict())
    x, call = torch.randn(2, 7, D, dtype=dtype), {k: v.to(dtype) if k == "bias" else v for k, v in call.items()}
    expected, found = results(plain, x, **call), results(fused, x, **call)
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("impl", FUSED)
def test_implementations_agree_in_bf16(impl: str) -> None:
    plain, fused = (layer_of(name, torch.bfloat16, rotary=True, num_kv_heads=2) for name in ("torch", impl))
    x = torch.randn(2, 16, D).bfloat16()
    found, expected = results(fused, x), results(plain, x)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-2 * value.abs().max(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_sees_the_future_and_no_row_another(impl: str) -> None:
    dtype, _ = precise(impl)
    layer = layer_of(impl, dtype, rotary=True, alibi=True, num_kv_heads=2, qk_ln=True)
    for seed in range(50 if impl != "triton" else 2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 8, D, generator=generator, dtype=dtype)
        t = int(torch.randint(1, 8, (), generator=generator))
        later, other = x.clone(), x.clone()
        later[:, t] += torch.randn(D, generator=generator, dtype=dtype)
        other[0] = torch.randn(8, D, generator=generator, dtype=dtype)
        y = layer(x)[0]
        assert (layer(later)[0] - y)[:, :t].abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)
        assert (layer(later)[0] - y)[:, t:].abs().amax((0, 2)).min() > 1e-4
        assert layer(other)[0][1:].equal(y[1:])


def test_state_dict_is_the_published_one() -> None:
    shapes = {name: tuple(t.shape) for name, t in MultiQueryAttention(512, 8, "torch").state_dict().items()}
    expected = {"Wqkv.weight": (512 + 2 * 64, 512), "Wqkv.bias": (640,), "out_proj.weight": (512, 512)}
    assert shapes == expected | {"out_proj.bias": (512,)}
    layer = layer_of(num_kv_heads=2, head_dim=6, use_bias=False, qk_ln=True, norm_type="rmsnorm", sinks=True)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    expected = {"Wqkv.weight": (36 + 24, D), "out_proj.weight": (D, 36), "q_ln.weight": (36,), "k_ln.weight": (6,)}
    assert shapes == expected | {"sinks": (HEADS,)}


def test_starts_from_the_seed() -> None:
    first, second, other = (MultiQueryAttention(64, 4, "torch", seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert a.equal(b) and (a.dim() == 1 or not a.equal(c))
    assert abs(float(first.Wqkv.weight.detach().std()) * 8 - 1) < 0.05
    assert not MultiQueryAttention(64, 4, "torch").Wqkv.weight.equal(MultiQueryAttention(64, 4, "torch").Wqkv.weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout(impl: str) -> None:
    """Scales what is kept; none in evaluation; torch and triton draw by (seed, step, row)."""
    dtype, atol = precise(impl)
    layer, x = layer_of(impl, dtype, attn_pdrop=0.5), torch.randn(3, 8, D, dtype=dtype)
    plain = layer_of("torch", dtype)(x)[0]
    torch.testing.assert_close(layer.eval()(x)[0], plain, rtol=0, atol=atol)
    assert layer.train().step == 0
    first, second = layer(x)[0], layer(x)[0]
    assert layer.step == 2 and not first.equal(second) and not first.allclose(plain)
    if impl == "flash":
        return
    assert layer(x, step=0)[0].equal(first) and layer.step == 2
    part = layer(x[1:], step=0, first_row=1)[0]
    torch.testing.assert_close(part, first[1:], rtol=0, atol=atol)
    weights = layer_of("torch", dtype, attn_pdrop=0.5)(x, needs_weights=True)[1]
    kept = weights != 0
    undropped = layer_of("torch", dtype)(x, needs_weights=True)[1]
    torch.testing.assert_close(weights, 2 * undropped * kept)
    assert 0.4 < kept.double().sum() / (undropped != 0).sum() < 0.6
    torch.testing.assert_close(layer_of("torch", dtype, attn_pdrop=0.5)(x)[0], first, rtol=0, atol=atol)


def test_dropout_that_is_run_again_without_torchs_generator_wants_its_step() -> None:
    layer, x = layer_of(attn_pdrop=0.2), torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x, step=0)[0].sum(), x)
    again = checkpoint(lambda x: layer(x, step=0)[0], x, use_reentrant=False)
    assert torch.autograd.grad(again.sum(), x)[0].equal(expected)
    y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(ValueError, match="give forward the same `step` both times"):
        y.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str) -> None:
    """Everything but the norm's wide form is in bf16; the output is near that of fp32."""
    for norm_type in ("low_precision_layernorm", "layernorm"):
        layer = layer_of(impl, torch.float32, qk_ln=True, rotary=True, alibi=True, norm_type=norm_type)
        x, mask = torch.randn(2, 9, D), torch.ones(2, 9, dtype=torch.bool)
        mask[0, :4] = False
        expected = layer(x, attention_mask=mask)[0]
        with torch.autocast("cpu", torch.bfloat16):
            y, _, past = layer(x, (), attention_mask=mask, bias=torch.zeros(9, 9))
        assert y.dtype == past[0].dtype == past[1].dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=3e-2)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_alibi_in_bf16_keeps_distances_exact() -> None:
    """Slopes 2^-0.5 and distances above 256 are no bf16 numbers."""
    layer = layer_of(dtype=torch.bfloat16, heads=12, alibi=True)
    other = layer_of(dtype=torch.bfloat16, heads=12)
    x = torch.randn(1, 400, D).bfloat16()
    assert layer(x)[0].equal(other(x, bias=alibi_bias(12, 400, causal=False))[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_strides_and_copies(impl: str) -> None:
    dtype, _ = precise(impl)
    layer = layer_of(impl, dtype, rotary=True, num_kv_heads=2)
    x = torch.randn(5, D, 3, dtype=dtype).permute(2, 0, 1)
    assert not x.is_contiguous()
    y = layer(x)[0]
    torch.testing.assert_close(y, layer(x.contiguous())[0])
    assert copy.deepcopy(layer)(x)[0].equal(y)
    for empty in (x[:0], x[:, :0]):
        found = results(layer, empty)
        assert found["y"].shape == empty.shape and found["Wqkv.weight"].eq(0).all()
    assert layer(x[:, :0], layer(x, ())[2])[2][0].shape == (3, 2, 5, D // HEADS)
