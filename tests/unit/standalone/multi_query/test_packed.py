"""Sequences packed one after the other are what each of them is on its own."""

from typing import Any

import pytest
import torch

from tests.unit.standalone.multi_query.helpers import IMPLS, OPTIONS, D, layer_of, precise, results

LENGTHS = [3, 0, 5, 1]
CU = torch.tensor([0, 3, 3, 8, 9])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_each_is_on_its_own(impl: str, options: dict[str, Any], causal: bool) -> None:
    if impl == "triton" and (not causal or options.get("num_kv_heads", 1) > 2):
        pytest.skip("slow in the interpreter")
    dtype, atol = precise(impl)
    layer, x = layer_of(impl, dtype, **options), torch.randn(9, D, dtype=dtype)
    found = results(layer, x, cu_seqlens=CU, causal=causal)
    for name in ("y", "x"):
        assert found[name].shape == (9, D)
    one = x.clone().requires_grad_()
    expected = torch.cat([layer(part[None], causal=causal)[0][0] for part in one.split(LENGTHS)])
    torch.testing.assert_close(found["y"], expected, rtol=0, atol=atol)
    layer.zero_grad()
    weight = torch.randn(9, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    (expected * weight).sum().backward()
    wanted = {"x": one.grad} | {name: param.grad for name, param in layer.named_parameters()}
    torch.testing.assert_close({n: found[n] for n in wanted}, wanted, rtol=0, atol=10 * atol)


def test_dropout_counts_sequences_as_rows() -> None:
    layer, x = layer_of(attn_pdrop=0.4), torch.randn(9, D, dtype=torch.float64)
    y = layer(x, cu_seqlens=CU.int(), step=0)[0]
    for n, (part, found) in enumerate(zip(x.split(LENGTHS), y.split(LENGTHS), strict=True)):
        torch.testing.assert_close(found, layer(part[None], step=0, first_row=n)[0][0])


def test_nothing_packed() -> None:
    layer = layer_of(rotary=True)
    for cu in ([0], [0, 0, 0]):
        y = layer(torch.zeros(0, D, dtype=torch.float64), cu_seqlens=torch.tensor(cu))[0]
        assert y.shape == (0, D)


ERRORS = [
    (dict(x=torch.zeros(1, 9, D)), r"must be with cu_seqlens \[tokens, d_model=24\]"),
    (dict(cu_seqlens=[0, 9]), "a list of 2, but must be a tensor"),
    (dict(cu_seqlens=CU.float()), "a tensor of torch.float32, but must be"),
    (dict(cu_seqlens=CU[:0]), "must be a tensor"),
    (dict(cu_seqlens=CU[1:]), "goes from 3 to 9, but must rise from 0 to the 9 tokens"),
    (dict(cu_seqlens=CU[:-1]), "goes from 0 to 8"),
    (dict(cu_seqlens=torch.tensor([0, 5, 3, 9])), "must rise"),
    (dict(mask=torch.ones(1, 9).bool(), bias=torch.zeros(9)), "take no bias, mask"),
    (dict(past_key_value=()), "take no past_key_value"),
    (dict(needs_weights=True), "take no needs_weights"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_says_no(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(dtype=torch.float32)(**({"x": torch.zeros(9, D), "cu_seqlens": CU} | call))
