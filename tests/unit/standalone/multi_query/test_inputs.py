"""Caches, masks and biases of `MultiQueryAttention`, and what it says when something does not fit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist import MultiQueryAttention
from moe_dist.attention.alibi import alibi_bias
from moe_dist.attention.kv_cache import KVCache
from moe_dist.standalone.multi_query.options import check_options
from tests.unit.kernels.pretended_packages import flash_attn, pretended
from tests.unit.standalone.multi_query.helpers import FUSED, HEADS, IMPLS, D, layer_of, precise, results

POSITIONS = [dict(rotary=True), dict(alibi=True, num_kv_heads=2), dict(window=4, sinks=True)]


def cache_of(layer: MultiQueryAttention, rows: int, length: int = 12, **options: Any) -> KVCache:
    return KVCache(rows, length, layer.held_kv_heads, layer.head_dim, **options)


@pytest.mark.parametrize("kind", ["pair", "cache"])
@pytest.mark.parametrize("chunks", [[1] * 12, [3, 1, 5, 2, 1], [12]])
@pytest.mark.parametrize("options", POSITIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_are_the_whole(impl: str, options: dict[str, Any], chunks: list[int], kind: str) -> None:
    """One token at a time and uneven chunks, with a mask and a bias of the whole, in fp32 to 1e-5."""
    if impl == "triton" and len(chunks) == 12 and (kind == "pair" or "rotary" not in options):
        pytest.skip("slow in the interpreter")
    layer, x = layer_of(impl, torch.float32, qk_ln=True, **options), torch.randn(2, 12, D)
    mask, bias = torch.ones(2, 12, dtype=torch.bool), torch.randn(HEADS, 12, 12)
    mask[1, :2] = False
    whole, _, past = layer(x, bias=bias, attention_mask=mask)
    assert past is None
    past = () if kind == "pair" else cache_of(layer, 2)
    parts, end = [], 0
    for part in x.split(chunks, 1):
        end += part.shape[1]
        y, _, past = layer(part, past, bias=bias[:, :end, :end], mask=mask[:, :end])
        parts.append(y)
        keys = past.get()[0] if isinstance(past, KVCache) else past[0]
        assert keys.shape == (2, layer.num_kv_heads, end, layer.head_dim) and not keys.requires_grad
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", POSITIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_cache_with_different_lengths(impl: str, options: dict[str, Any], causal: bool) -> None:
    """Prompts of 5 and 2 tokens, padded on the right, then 3 more: each row as if it were alone."""
    dtype, atol = precise(impl)
    layer, x, more = layer_of(impl, dtype, **options), *torch.randn(2, 2, 5, D, dtype=dtype)
    cache, more = cache_of(layer, 2, dtype=dtype), more[:, :3]
    layer(x, cache)
    cache.truncate([5, 2])
    with pytest.raises(ValueError, match="end at different positions"):
        layer(more, cache, bias=torch.zeros(8, 8, dtype=dtype))
    y = layer(more, cache, causal=causal)[0]
    for row, length in enumerate((5, 2)):
        _, _, past = layer(x[row : row + 1, :length], ())
        alone = layer(more[row : row + 1], past, causal=causal)[0]
        torch.testing.assert_close(y[row : row + 1], alone, rtol=0, atol=atol)


def test_what_a_cache_keeps_is_detached_but_a_given_past_is_not() -> None:
    """A learned prefix gets its gradient; a wider cache than the layer's precision works."""
    layer, x = layer_of("torch", torch.bfloat16), torch.randn(1, 3, D).bfloat16()
    past = tuple(torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(2))
    y, _, kept = layer(x, past)
    assert y.dtype == torch.bfloat16 and kept[0].shape == (1, 1, 5, 4) and not kept[0].requires_grad
    y.sum().backward()
    assert all(t.grad.abs().min() > 0 for t in past)
    cache = cache_of(layer, 1)  # fp32
    assert layer(x, cache)[2] is cache and cache.get()[0].dtype == torch.float32


def test_errors_leave_the_cache_as_it_was() -> None:
    layer, x = layer_of(), torch.randn(2, 3, D, dtype=torch.float64)
    cache = cache_of(layer, 2, 5)
    layer(x, cache)
    for call in (dict(mask=torch.ones(2, 3)), dict(bias=torch.zeros(3, 3))):
        with pytest.raises(ValueError):
            layer(x[:, :2], cache, **call)
    with pytest.raises(ValueError, match="3 tokens in the cache and 3 more are above max_seq_len=5"):
        layer(x, cache)
    assert cache.lengths == [3, 3]


@pytest.mark.parametrize("options", [dict(rotary=True), dict(alibi=True), dict(num_kv_heads=2)])
@pytest.mark.parametrize("impl", IMPLS)
def test_left_padding_changes_nothing(impl: str, options: dict[str, Any]) -> None:
    dtype, atol = precise(impl)
    layer, x = layer_of(impl, dtype, **options), torch.randn(1, 5, D, dtype=dtype)
    padded, mask = torch.cat((torch.randn(1, 3, D, dtype=dtype), x), 1), torch.tensor([[0] * 3 + [1] * 5])
    torch.testing.assert_close(layer(padded, mask=mask)[0][:, 3:], layer(x)[0], rtol=0, atol=atol)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing(impl: str) -> None:
    """Their output is the bias of out_proj, their gradients are finite, and masked keys get none."""
    dtype, atol = precise(impl)
    layer, x = layer_of(impl, dtype, alibi=True, qk_ln=True), torch.randn(3, 6, D, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0] * 6, [0, 0, 1, 1, 1, 1]]).bool()
    found = results(layer, x, attention_mask=mask)
    nothing = layer.out_proj.bias.detach()
    for row, tokens in ((1, slice(None)), (2, slice(0, 2))):
        torch.testing.assert_close(found["y"][row, tokens], nothing.expand_as(found["y"][row, tokens]))
        assert found["x"][row, tokens].eq(0).all()
    assert all(t.isfinite().all() for t in found.values())
    other = x.clone()
    other[0, 2, :5] += 1  # a masked key, but also a query
    difference = (layer(other, mask=mask)[0] - found["y"]).abs().amax(-1)
    assert difference[0, 2] > 1e-3 and difference[0, 3:].max() < atol
    for same in (mask.int(), mask.long(), mask.to(torch.uint8)):
        assert layer(x, attention_mask=same)[0].equal(found["y"])
    hidden = torch.zeros(3, 1, 1, 6, dtype=dtype).masked_fill(~mask[:, None, None], -torch.inf)
    torch.testing.assert_close(layer(x, bias=hidden)[0], found["y"], rtol=0, atol=atol)


@pytest.mark.parametrize("sinks", [False, True])
def test_weights_are_those_of_the_output(sinks: bool) -> None:
    layer, x = layer_of(num_kv_heads=3, sinks=sinks), torch.randn(2, 4, D, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1], [0] * 4])
    y, weights, (_, v) = layer(x, (), attention_mask=mask, needs_weights=True)
    assert weights.shape == (2, HEADS, 4, 4) and y.equal(layer(x, attention_mask=mask)[0])
    heads = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(layer.out_proj(heads.transpose(1, 2).flatten(2)), y)
    assert weights[1].eq(0).all() and weights[0, :, :, 2].eq(0).all() and weights.triu(1).eq(0).all()
    total = weights[0].sum(-1)
    assert (total < 1).all() if sinks else torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_alibi_as_a_bias(impl: str, causal: bool) -> None:
    """Both builders' forms, longer than needed, are what `alibi` does inside."""
    dtype, atol = precise(impl)
    layer, other = layer_of(impl, dtype, alibi=True), layer_of(impl, dtype)
    x, expected = torch.randn(2, 5, D, dtype=dtype), None
    expected = layer(x, causal=causal)[0]
    for keys in (5, 9):
        found = other(x, bias=alibi_bias(HEADS, keys, causal, dtype), causal=causal)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_bias_is_cut_to_its_last_entries() -> None:
    layer, x = layer_of(), torch.randn(2, 4, D, dtype=torch.float64)
    bias = torch.randn(2, HEADS, 7, 9, dtype=torch.float64)
    expected = layer(x, bias=bias[:, :, 3:, 5:])[0]
    assert layer(x, bias=bias)[0].equal(expected) and not layer(x, bias=bias[:, :, :4, :4])[0].equal(expected)
    for shape in ((4,), (1, 4), (4, 1), (HEADS, 1, 9), (2, 1, 1, 4), ()):
        part = torch.randn(shape, dtype=torch.float64)
        whole = part.expand(2, HEADS, 4, part.shape[-1] if part.dim() else 1)
        torch.testing.assert_close(layer(x, bias=part)[0], layer(x, bias=whole)[0])


def test_bias_gets_its_gradient() -> None:
    layer, x = layer_of(), torch.randn(2, 4, D, dtype=torch.float64)
    bias = torch.randn(HEADS, 5, 5, dtype=torch.float64, requires_grad=True)
    layer(x, bias=bias)[0].square().sum().backward()
    assert bias.grad[:, 0].eq(0).all() and bias.grad[:, 2:, 1:3].abs().min() > 0


CONSTRUCTOR = [
    (dict(heads=5), "d_model=24 is not divisible by heads=5"),
    (dict(heads=0), "heads=0 is below 1"),
    (dict(head_dim=0), "head_dim=0 is below 1"),
    (dict(num_kv_heads=4), "heads=6 is not divisible by num_kv_heads=4"),
    (dict(attn_impl="fast"), "unknown attn_impl 'fast': choose triton, flash, flash_attn or torch"),
    (dict(clip_qkv=0.0), "clip_qkv=0.0 must be above 0"),
    (dict(attn_pdrop=1.0), "attn_pdrop=1.0 is outside"),
    (dict(norm_type="batchnorm"), "unknown norm_type 'batchnorm': choose one of layernorm"),
    (dict(fc_type="te"), "unknown fc_type 'te'"),
    (dict(window=0), "window=0 is below 1"),
    (dict(rotary=True, head_dim=3), "head_dim=3 is odd"),
    (dict(seed=-1), "seed=-1 is outside"),
]


@pytest.mark.parametrize(("options", "message"), CONSTRUCTOR)
def test_constructor_says_no(options: dict[str, Any], message: str) -> None:
    settings = dict(d_model=D, heads=HEADS, attn_impl="torch") | options
    with pytest.raises(ValueError, match=message):
        MultiQueryAttention(**settings)


def test_triton_says_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default, in one line, which names the alternative."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="attn_impl=triton needs a GPU, but this run is on cpu: set it to flash") as no:
        MultiQueryAttention(D, HEADS, device="cpu")
    assert "\n" not in str(no.value)
    monkeypatch.setattr("moe_dist.kernels.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="attn_impl=triton, but triton is not installed"):
        MultiQueryAttention(D, HEADS, device="cpu")


def test_flash_attn_is_taken_by_name_and_says_where_it_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"^attn_impl=flash_attn needs a GPU, but .* set it to flash$"):
        MultiQueryAttention(D, HEADS, "flash_attn", device="cpu")
    check = partial(check_options, "flash_attn", None, norm_type="layernorm", fc_type="torch", window=None)
    with pretended(flash_attn()):
        check(attn_pdrop=0.0, device_type="cuda")
        with pytest.raises(ValueError, match=r"attn_pdrop=0\.1 with attn_impl=flash_attn would draw numbers"):
            check(attn_pdrop=0.1, device_type="cuda")


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


FORWARD = [
    (dict(mask=torch.ones(2, 3), attention_mask=torch.ones(2, 3)), "give one of them"),
    (dict(mask=torch.ones(2, 3)), "a tensor of torch.float32, but must be bool or integers"),
    (dict(mask=[[1, 1, 1]] * 2), "a list of 2, but must be bool"),
    (dict(mask=torch.full((2, 3), 2)), "integers other than 0 and 1"),
    (dict(mask=torch.full((2, 3), -1)), "integers other than 0 and 1"),
    (dict(mask=torch.ones(2, 4).bool()), r"shape \(2, 4\), but must be \(2, 3\)"),
    (dict(mask=torch.ones(2, 3).bool(), past_key_value=pair(2, 1, 2, 4)), r"must be \(2, 5\).*past counted"),
    (dict(bias=torch.zeros(2, 3)), r"\(2, 3\), which does not broadcast to \(B, H, Sq, Sk\) = \(2, 6, 3, 3\)"),
    (dict(bias=torch.zeros(3, 2)), "but not shorter"),
    (dict(bias=torch.zeros(5, 3, 3)), "does not broadcast"),
    (dict(bias=torch.zeros(1, 1, 1, 3, 3)), "more than the four dimensions"),
    (dict(bias=torch.zeros(3, 3).bool()), "a tensor of torch.bool, but must be a tensor of floating-point"),
    (dict(past_key_value=pair(2, 1, 2, 4)[0]), "a tensor of torch.float32: give None"),
    (dict(past_key_value=pair(2, 1, 2, 4)[:1]), "a tuple of 1: give None"),
    (dict(past_key_value=pair(2, 2, 2, 4)), "G=1 .*, P=4"),
    (dict(past_key_value=pair(3, 1, 2, 4)), "B=2"),
    (dict(past_key_value=(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 3, 4))), "must both be"),
    (dict(past_key_value=(None, None)), "must both be"),
    (dict(past_key_value=KVCache(2, 4, 2, 4)), "do not fit a cache of 2 heads"),
    (dict(x=torch.zeros(2, D)), r"x has shape \(2, 24\), but must be \[batch, tokens, d_model=24\]"),
    (dict(x=torch.zeros(1, 2, 25)), "d_model=24"),
]


@pytest.mark.parametrize(("call", "message"), FORWARD)
def test_forward_says_no(call: dict[str, Any], message: str) -> None:
    layer = layer_of(dtype=torch.float32)
    with pytest.raises(ValueError, match=message) as error:
        layer(**({"x": torch.zeros(2, 3, D)} | call))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", FUSED)
def test_fused_implementations_have_no_weights(impl: str) -> None:
    layer = layer_of(impl, torch.float32)
    with pytest.raises(ValueError, match=f"attn_impl='{impl}' never has the weights.*only attn_impl='torch' can"):
        layer(torch.zeros(1, 2, D), needs_weights=True)


def test_verbose_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    MultiQueryAttention(D, HEADS, "flash", verbose=1, device="cpu")
    assert "heads=6" in (said := capsys.readouterr().out) and said.endswith("attention by torch-sdpa\n")
    MultiQueryAttention(D, HEADS, "flash", device="cpu")
    assert capsys.readouterr().out == ""
