"""Keys cut into splits for few queries, against the plain oracle in float64; and when they are cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.attention import reference, triton_decode
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.kernels.attention.triton import attend
from moe_dist.kernels.attention.triton_call import AttentionTiling, Call, Tile, choose_attention_tiling
from moe_dist.kernels.attention.triton_decode import decode, decode_splits
from moe_dist.kernels.random import RandomKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = AttentionTiling(Tile(16, 16), Tile(16, 16), Tile(16, 16))
B, H, K, P = 2, 4, 75, 20
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(groups: int, queries: int) -> list[Tensor]:
    """Keys and values are the filled part of a longer cache."""
    cache = torch.randn(2, B, groups, K + 9, P, device=DEVICE)
    return [torch.randn(B, H, queries, P, device=DEVICE), *cache[:, :, :, :K]]


def pattern_of(name: str, queries: int) -> Pattern:
    keys_BS = torch.rand(B, K, device=DEVICE) > 0.4
    keys_BS[1] = False  # a row that sees nothing
    everything = Pattern(
        window=40,
        starts_B=torch.tensor([K - queries, 30], device=DEVICE),
        keys_BS=keys_BS,
        slopes_H=torch.rand(H, device=DEVICE),
        bias=torch.randn(H, 1, K, device=DEVICE),
        sinks_H=torch.randn(H, device=DEVICE),
        dropout=Dropout(0.3, RandomKey.of("test")),
    )
    return {"causal": Pattern(), "hidden": Pattern(causal=False, keys_BS=keys_BS), "everything": everything}[name]


@pytest.mark.parametrize("name", ["causal", "hidden", "everything"])
@pytest.mark.parametrize("groups, queries, splits", [(1, 1, 2), (2, 3, 3), (4, 1, 7)])
def test_splits_do_not_change_the_result(groups: int, queries: int, splits: int, name: str) -> None:
    """Also more splits than there are blocks of keys."""
    tensors, pattern = inputs(groups, queries), pattern_of(name, queries)
    call = Call(replace(pattern, bias=None, sinks_H=None), 0.3, SMALL)
    out = decode(*tensors, pattern.bias, pattern.sinks_H, call, splits)
    expected = reference.attend(*(t.double() for t in tensors), pattern, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    if name == "hidden":
        assert not out[1].any()


def test_half_precision() -> None:
    tensors = [t.bfloat16() for t in inputs(1, 2)]
    out = decode(*tensors, None, None, Call(Pattern(), 0.3, SMALL), 3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), reference.attend(*(t.double() for t in tensors), None, 0.3), rtol=0, atol=1e-2
    )


def test_attend_splits_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = []
    run = triton_decode.run_forward
    monkeypatch.setattr(triton_decode, "run_forward", lambda *args: splits.append(args[-1]) or run(*args))
    q, k, v = (torch.randn(1, heads, length, P, device=DEVICE) for heads, length in ((H, 2), (1, 1024), (1, 1024)))
    expected = reference.attend(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=0, atol=1e-5)
    assert splits == [4]
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        attend(leaf, k, v)
    assert splits == [4, 4]
    small = AttentionTiling(Tile(16, 512), Tile(16, 16), Tile(16, 16))
    torch.testing.assert_close(attend(leaf, k, v, tiling=small).double(), expected, rtol=0, atol=1e-5)
    assert splits == [4, 4]  # a gradient is needed: the ordinary kernel


@pytest.mark.parametrize(
    "batch, queries, keys, splits",
    [(1, 1, 8192, 32), (64, 1, 8192, 4), (512, 1, 8192, 1), (1, 1, 300, 1), (1, 17, 8192, 1)],
)
def test_when_keys_are_split(batch: int, queries: int, keys: int, splits: int) -> None:
    """Few keys, many programs already, or many rows: no splits."""
    q, k = torch.empty(batch, H, queries, 64, device="meta"), torch.empty(batch, 1, keys, 64, device="meta")
    tiling = choose_attention_tiling(torch.bfloat16, 64, queries * H, Pattern())
    assert decode_splits(q, k, Call(Pattern(), 1.0, tiling)) == splits
