"""Packed sequences: the plain loop by hand, and the Triton kernels against it in float64."""

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.attention import reference
from moe_dist.kernels.attention.pattern import Dropout, PackedSequences, Pattern
from moe_dist.kernels.attention.triton import attend_varlen
from moe_dist.kernels.attention.triton_call import AttentionTiling, Tile
from moe_dist.kernels.attention.varlen import one_by_one, varlen
from moe_dist.kernels.random import RandomKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = AttentionTiling(Tile(16, 16), Tile(16, 16), Tile(16, 16))
H, P = 4, 20
QUERIES, KEYS = [5, 0, 19, 1], [5, 3, 33, 0]  # also nothing to ask, nothing to see, and a cache
pytestmark = pytest.mark.usefixtures("poisoned")


def packed(queries: list[int], keys: list[int]) -> PackedSequences:
    cu_q, cu_k = (torch.tensor([0, *each], device=DEVICE).cumsum(0).to(torch.int32) for each in (queries, keys))
    return PackedSequences(cu_q, cu_k, max(queries), max(keys))


def inputs(groups: int, queries: list[int] = QUERIES, keys: list[int] = KEYS) -> list[Tensor]:
    shapes = ((sum(queries), H, P), (sum(keys), groups, P), (sum(keys), groups, P))
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]


def patterns() -> dict[str, Pattern]:
    sinks_H = torch.randn(H, device=DEVICE).requires_grad_()
    return {
        "causal": Pattern(),
        "all": Pattern(causal=False),
        "window": Pattern(window=6),
        "alibi": Pattern(slopes_H=torch.rand(H, device=DEVICE)),
        "sinks": Pattern(sinks_H=sinks_H),
        "everything": Pattern(
            window=9,
            slopes_H=torch.rand(H, device=DEVICE),
            sinks_H=sinks_H,
            dropout=Dropout(0.3, RandomKey.of("test"), 5),
        ),
    }


def with_gradients(
    attend: object, tensors: list[Tensor], *rest: object, weight: Tensor, sinks: Tensor | None
) -> list[Tensor]:
    out = attend(*tensors, *rest)  # type: ignore[operator]
    wanted = tensors + ([] if sinks is None else [sinks])
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), wanted)]


@pytest.mark.parametrize("name, groups", [*((name, 1) for name in patterns()), ("everything", 2)])
def test_triton_is_the_plain_loop(name: str, groups: int) -> None:
    tensors, pattern = inputs(groups), patterns()[name]
    lengths = (packed(QUERIES, KEYS), pattern, 0.3)
    weight = torch.randn_like(tensors[0])
    found = with_gradients(
        lambda *args: attend_varlen(*args, tiling=SMALL), tensors, *lengths, weight=weight, sinks=pattern.sinks_H
    )
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    expected = with_gradients(one_by_one(reference.attend), doubles, *lengths, weight=weight, sinks=pattern.sinks_H)
    for actual, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), oracle.double(), rtol=0, atol=2e-5)


def test_generation_from_a_packed_cache_is_split() -> None:
    """Without gradients, and through the choices that ship."""
    queries, keys = [1, 1], [700, 40]
    tensors = [t.detach() for t in inputs(1, queries, keys)]
    lengths = (packed(queries, keys), Pattern(), None)
    found = attend_varlen(*tensors, *lengths)
    expected = one_by_one(reference.attend)(*(t.double() for t in tensors), *lengths)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "flash", "packed"])
def test_a_sequence_is_on_its_own(backend: str) -> None:
    """Each is what attention gives without its neighbours."""
    lengths = [3, 7]
    q, k, v = inputs(2, lengths, lengths)
    found = varlen(backend)(q, k, v, packed(lengths, lengths), None, None)
    alone = [
        reference.attend(*(t[part].transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
        for part in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(found, torch.cat(alone))


def test_refusals() -> None:
    tensors = inputs(1)
    for backend in ("torch", "triton"):
        pattern = Pattern(keys_BS=torch.ones(1), bias=torch.ones(1))
        with pytest.raises(ValueError, match="packed sequences take no keys_BS, bias: pad them"):
            varlen(backend)(*tensors, packed(QUERIES, KEYS), pattern, None)
    with pytest.raises(ValueError, match="unknown attention backend"):
        varlen("none")
