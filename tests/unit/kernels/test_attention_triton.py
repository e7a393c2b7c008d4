"""The Triton attention against the plain oracle in float64: output and all gradients. On CPU in Triton's interpreter.

Blocks are tiny, so that every loop has several steps and every size ends inside a block.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.attention import reference
from moe_dist.kernels.attention.backend import attention
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.kernels.attention.triton import attend
from moe_dist.kernels.attention.triton_call import (
    AttentionTiling,
    Tile,
    choose_attention_tiling,
    choose_splits,
)
from moe_dist.kernels.random import RandomKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = AttentionTiling(Tile(16, 16), Tile(16, 16), Tile(16, 16))
B, H, Q, K, P = 2, 4, 7, 37, 20
pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def inputs(groups: int, queries: int = Q, dtype: torch.dtype = torch.float32, keys: int = K) -> list[Tensor]:
    """q, k and v as a layer gives them: views with the heads inside the tokens."""
    shapes = ((B, queries, H, P), (B, keys, groups, P), (B, keys, groups, P))
    return [random(*shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def wide(pattern: Pattern) -> Pattern:
    """Its tensors in float64, with gradients of their own."""
    names = ("slopes_H", "bias", "sinks_H")
    given = {name: getattr(pattern, name) for name in names if getattr(pattern, name) is not None}
    return replace(pattern, **{name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()})


def leaves(tensors: list[Tensor], pattern: Pattern) -> list[Tensor]:
    return [t for t in (*tensors, pattern.bias, pattern.sinks_H) if t is not None and t.requires_grad]


def check(
    tensors: list[Tensor],
    pattern: Pattern,
    scale: float | None = 0.3,
    tiling: AttentionTiling | None = SMALL,
    tolerance: float = 1e-5,
) -> list[Tensor]:
    """Output and gradients, which are returned too."""
    dtype, weight = tensors[0].dtype, torch.randn_like(tensors[0])
    doubles, wide_pattern = [t.detach().double().requires_grad_() for t in tensors], wide(pattern)
    wanted = reference.attend(*doubles, wide_pattern, scale)
    expected = [wanted, *torch.autograd.grad((wanted * weight).sum(), leaves(doubles, wide_pattern))]

    out = attend(*tensors, pattern, scale, tiling=tiling)
    assert out.dtype == dtype
    found = [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves(tensors, pattern))]
    for name, actual, oracle in zip("out q k v 1 2".split(), found, expected, strict=False):
        top = max(1.0, float(oracle.detach().abs().max()))
        torch.testing.assert_close(
            actual.double(), oracle, rtol=0, atol=tolerance * top, msg=lambda m, name=name: f"{name}: {m}"
        )
    return found


def hiding_bias() -> Tensor:
    bias = random(B, H, Q, K)
    bias[:, :, 0] = -torch.inf  # a query that sees nothing
    bias[:, :, :, 3] = -torch.inf
    return bias.requires_grad_()


def hidden_keys() -> Tensor:
    keys_BS = torch.rand(B, K, device=DEVICE) > 0.4
    keys_BS[1] = False  # a row that sees nothing
    return keys_BS


PATTERNS: dict[str, Callable[[], Pattern]] = {
    "causal": Pattern,
    "all": lambda: Pattern(causal=False),
    "window": lambda: Pattern(window=5),
    "window of a few blocks": lambda: Pattern(window=19),
    "window to both sides": lambda: Pattern(causal=False, window=4),
    "cache": lambda: Pattern(starts_B=torch.tensor([0, K - Q], device=DEVICE)),
    "cache and window": lambda: Pattern(window=18, starts_B=torch.tensor([26, 9], device=DEVICE)),
    "left padding": lambda: Pattern(keys_BS=torch.arange(K, device=DEVICE) >= torch.tensor([[3], [29]], device=DEVICE)),
    "hidden keys": lambda: Pattern(causal=False, keys_BS=hidden_keys()),
    "alibi": lambda: Pattern(slopes_H=random(H).abs()),
    "alibi to both sides": lambda: Pattern(causal=False, slopes_H=random(H).abs()),
    "bias": lambda: Pattern(bias=random(Q, K).requires_grad_()),
    "bias of rows": lambda: Pattern(causal=False, bias=random(B, 1, 1, K).requires_grad_()),
    "bias that hides": lambda: Pattern(bias=hiding_bias()),
    "sinks": lambda: Pattern(sinks_H=random(H).requires_grad_(), keys_BS=hidden_keys()),
    "dropout": lambda: Pattern(dropout=Dropout(0.3, RandomKey.of("test"), 3, 5, 17)),
    "everything": lambda: Pattern(
        window=9,
        starts_B=torch.tensor([20, 3], device=DEVICE),
        keys_BS=hidden_keys(),
        slopes_H=random(H).abs(),
        bias=random(H, 1, K).requires_grad_(),
        sinks_H=random(H).requires_grad_(),
        dropout=Dropout(0.2, RandomKey.of("test")),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str) -> None:
    check(inputs(1), PATTERNS[name]())


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int) -> None:
    check(inputs(groups), PATTERNS["everything"]())


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, K), (K, K), (16, 32), (20, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_sizes(queries: int, keys: int, causal: bool) -> None:
    """Also more queries than keys: the first ones see nothing."""
    shapes = ((1, 2, queries, P), (1, 1, keys, P), (1, 1, keys, P))
    check([random(*shape).requires_grad_() for shape in shapes], Pattern(causal))


@pytest.mark.parametrize("width", [1, 16, 64])
def test_widths(width: int) -> None:
    tensors = [random(1, n, length, width).requires_grad_() for n, length in ((H, Q), (2, K), (2, K))]
    check(tensors, Pattern(), None)


@pytest.mark.parametrize("tiling", [replace(SMALL, forward=Tile(32, 16)), replace(SMALL, grad_kv=Tile(16, 32)), None])
def test_blocks(tiling: AttentionTiling | None) -> None:
    """Other shapes of blocks, and those that ship."""
    check(inputs(1, 12), Pattern(window=20, sinks_H=random(H).requires_grad_()), tiling=tiling)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_half_precision(name: str) -> None:
    check(inputs(1, dtype=torch.bfloat16), PATTERNS[name](), tolerance=1e-2)
    check(inputs(1, dtype=torch.float16), PATTERNS[name](), tolerance=2e-3)


def test_rows_of_many_heads_are_cut_into_splits() -> None:
    """One key/value head: the gradients of its few keys are summed over parts of the rows."""
    tensors = [random(1, heads, length, 8).requires_grad_() for heads, length in ((16, 16), (1, 20), (1, 20))]
    assert choose_splits(2, 16 * 16 // 16, 8) == 2
    check(tensors, Pattern(window=9))


def test_every_run_gives_the_same_bits() -> None:
    tensors = inputs(1)
    runs = [attend(*tensors, tiling=SMALL) for _ in range(2)]
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_no_rows() -> None:
    q, k, v = inputs(2)
    assert attend(q[:, :, :0], k, v).shape == (B, H, 0, P)
    assert attend(q[:0], k[:0], v[:0]).shape == (0, H, Q, P)
    nothing = attend(q, k[:, :, :0], v[:, :, :0])
    assert not nothing.any()
    assert not torch.autograd.grad(nothing.sum(), q)[0].any()


def test_queries_that_see_nothing_are_zero() -> None:
    pattern = Pattern(keys_BS=hidden_keys())
    out, grad_q, grad_k, grad_v = check(inputs(1), pattern)
    assert not any(t[1].any() for t in (out, grad_q, grad_k, grad_v))


def test_dropout_draws_what_the_reference_draws() -> None:
    """With values that are units, the output is the weights."""
    q, k, _ = inputs(2)
    v = torch.eye(K, device=DEVICE).expand(B, 2, K, K)
    q, k = (torch.nn.functional.pad(t.detach(), (0, K - P)) for t in (q, k))
    pattern = Pattern(causal=False, dropout=Dropout(0.4, RandomKey.of("mask"), 7, 2, 11))
    found, (_, weights) = attend(q, k, v, pattern, tiling=SMALL), reference.attend_with_weights(q, k, v, pattern)
    assert torch.equal(found == 0, weights == 0)
    assert 0.3 < float((found == 0).double().mean()) < 0.5


@pytest.mark.parametrize("rate", [2.0**-53, 0.5, 1 / 3])
def test_dropout_is_a_comparison_of_integers(rate: float) -> None:
    tops = torch.tensor([0, 1, 2**52 - 1, 2**52, 2**52 + 1, 2**53 // 3, 2**53 // 3 + 1, 2**53 - 1])
    assert torch.equal(tops.double() * 2.0**-53 >= rate, tops >= math.ceil(rate * 2.0**53))


def test_strides() -> None:
    """Slices of larger tensors, a shared key/value head, and a gradient that is one number for all."""
    whole = random(B, K, H + 4, 2, P)
    q, k, v = whole[:, :Q, :H, 0], whole[:, :, H : H + 1, 0], whole[:, :, H : H + 1, 1]
    check([t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)], Pattern())
    q, k, v = inputs(1)
    k, v = k.expand(B, 2, K, P), v.mT.contiguous().mT
    out = attend(q, k, v.expand(B, 2, K, P), tiling=SMALL)
    wanted = reference.attend(q.double(), k.double(), v.double().expand(B, 2, K, P))
    found, expected = (torch.autograd.grad(o.sum(), q)[0] for o in (out, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one() -> None:
    (q, k, v), bias = inputs(1), random(Q, K)
    for wanted in (q, k, v):
        leaves = [t if t is wanted else t.detach() for t in (q, k, v)]
        out = attend(*leaves, Pattern(bias=bias), tiling=SMALL)
        expected = reference.attend(*leaves, Pattern(bias=bias))
        grads = [torch.autograd.grad(each.sum(), wanted)[0] for each in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    q, k, v = inputs(2)
    with pytest.raises(ValueError, match=r"computes in float32 .* use the attention backend torch or flash"):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :3], k, v)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        attend(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="up to 256 wide, not 257"):
        attend(*(random(1, 1, 1, 257) for _ in range(3)))
    with pytest.raises(ValueError, match="no gradient for slopes_H"):
        attend(q, k, v, Pattern(slopes_H=random(H).requires_grad_()))


def test_it_is_the_triton_backend() -> None:
    assert attention("triton") is attend


def test_choices_are_made_from_shapes() -> None:
    assert choose_splits(1000, 50, 8) == 1
    assert choose_splits(8, 64, 8) == 8
    assert choose_splits(0, 0, 8) == 1
    assert choose_attention_tiling(torch.bfloat16, 64, 5, Pattern()).forward.rows == 16
    assert choose_attention_tiling(torch.bfloat16, 64, 4096, Pattern()).forward.rows == 128


@pytest.mark.slow
def test_larger_sizes() -> None:
    """The blocks that ship, several of each."""
    shapes = ((1, 4, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64))
    for pattern in (Pattern(), Pattern(window=150)):
        check([random(*shape).requires_grad_() for shape in shapes], pattern, None, None)
