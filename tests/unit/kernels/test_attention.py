"""Fused attention against the plain oracle in float64: every kind of pattern, output and all gradients."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.attention import flash, reference
from moe_dist.kernels.attention.pattern import Dropout, Pattern
from moe_dist.kernels.random import RandomKey

B, H, K, P = 2, 4, 9, 8


def inputs(groups: int, queries: int, heads: int = H) -> list[Tensor]:
    shapes = ((B, heads, queries, P), (B, groups, K, P), (B, groups, K, P))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def patterns(queries: int) -> list[Pattern]:
    """Causal or not, with and without a window, places in a cache, hidden keys, ALiBi, two kinds of bias and sinks."""
    keys_BS = torch.rand(B, K) > 0.4
    keys_BS[1] = False  # a row that sees nothing
    hiding = torch.randn(B, H, queries, K, dtype=torch.float64)
    hiding[:, :, 0] = -torch.inf
    made = []
    for causal, window, placed, padded, alibi, bias, sinks in product(
        (True, False),
        (None, 3),
        (None, torch.tensor([0, K - queries])),
        (None, keys_BS),
        (None, torch.rand(H, dtype=torch.float64)),
        (None, torch.randn(queries, K, dtype=torch.float64), hiding),
        (None, torch.randn(H, dtype=torch.float64, requires_grad=True)),
    ):
        made.append(Pattern(causal, window, placed, padded, alibi, bias, sinks))
    return made


@pytest.mark.parametrize("queries", [1, 5, 9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_is_the_plain_maths(groups: int, queries: int) -> None:
    torch.manual_seed(groups * 10 + queries)
    for pattern in patterns(queries):
        leaves = inputs(groups, queries)
        weight = torch.randn(B, H, queries, P, dtype=torch.float64)
        wanted = leaves + ([] if pattern.sinks_H is None else [pattern.sinks_H])
        found = [
            (out, *torch.autograd.grad((out * weight).sum(), wanted))
            for out in (attend(*leaves, pattern, 0.3) for attend in (reference.attend, flash.attend))
        ]
        for expected, actual in zip(*found, strict=True):
            assert expected.isfinite().all()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12, msg=str(pattern))


def test_weights_are_softmaxes_of_what_is_seen() -> None:
    """By hand: query 1 of 3, the last key hidden, two equal scores."""
    zeros = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    keys_BS = torch.tensor([[True, True, False]])
    _, weights = reference.attend_with_weights(zeros, zeros, zeros, Pattern(keys_BS=keys_BS))
    expected = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights[0, 0], expected)


def test_a_window_counts_the_query_itself() -> None:
    visible = Pattern(window=2).visible(4, 4, torch.device("cpu"))
    assert visible is not None
    assert visible[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_alibi_is_a_penalty_of_distance() -> None:
    slopes_H = torch.tensor([0.5, 0.25])
    added = Pattern(causal=False, slopes_H=slopes_H).added(2, 3, torch.device("cpu"))
    assert added is not None
    expected = torch.tensor([[1.0, 0, 1], [2, 1, 0]])  # queries are at positions 1 and 2
    torch.testing.assert_close(added[0], -slopes_H[:, None, None] * expected)


def test_dropout_is_that_of_the_position() -> None:
    """A cut over rows and heads draws what the whole draws."""
    key, query_BQ = RandomKey.of("test"), torch.arange(6)[None]
    whole = Dropout(0.3, key).kept((4, 8, 6, 6), query_BQ)
    part = Dropout(0.3, key, first_row=2, first_head=4, heads=8).kept((2, 4, 6, 6), query_BQ)
    assert whole[2:, 4:].equal(part)
    later = Dropout(0.3, key).kept((4, 8, 1, 6), torch.tensor([[5]]))
    assert whole[:, :, 5:].equal(later)
    many = Dropout(0.3, key).kept((8, 8, 64, 64), torch.arange(64)[None])
    assert abs(float(many.double().mean()) - 0.7) < 0.005


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = (t.detach() for t in inputs(1, K))
    plain = reference.attend(q, k, v)
    draws = [reference.attend(q, k, v, Pattern(dropout=Dropout(0.2, RandomKey.of(i)))) for i in range(400)]
    std, mean = torch.std_mean(torch.stack(draws), 0)
    assert ((mean - plain).abs() <= 6 * std / 20 + 1e-9).all()
