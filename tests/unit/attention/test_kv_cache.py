"""The cache gives back what was put in, row by row, and says no when it is full."""

import pytest
import torch
from torch import Tensor

from moe_dist.attention.kv_cache import KVCache


def pairs(batch: int, length: int, heads: int = 2, width: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, length, width), torch.randn(batch, heads, length, width)


def test_gives_back_all_that_was_put_in() -> None:
    cache, parts = KVCache(3, 8, 2, 4), [pairs(2, n) for n in (3, 1, 4)]
    for k, v in parts:
        all_k, all_v = cache.update(k, v)
    assert all_k.equal(torch.cat([k for k, _ in parts], 2)) and all_v.equal(torch.cat([v for _, v in parts], 2))
    assert cache.cache_position == 8
    assert cache.get()[0].equal(all_k)


def test_rows_of_different_lengths() -> None:
    cache, (first_k, first_v), (k, v) = KVCache(2, 8, 2, 4), pairs(2, 4), pairs(2, 2)
    cache.update(first_k, first_v)
    cache.truncate([4, 1])
    assert cache.starts().tolist() == [4, 1]
    all_k, _ = cache.update(k, v)
    assert all_k[0].equal(torch.cat((first_k[0], k[0]), 1))
    assert all_k[1, :, :3].equal(torch.cat((first_k[1, :, :1], k[1]), 1))
    assert cache.lengths == [6, 3]


def test_overflow_raises_and_changes_nothing() -> None:
    cache = KVCache(2, 4, 2, 4)
    k, v = pairs(2, 3)
    cache.update(k, v)
    with pytest.raises(ValueError, match="3 tokens in the cache and 2 more are above max_seq_len=4"):
        cache.update(*pairs(2, 2))
    assert cache.get()[0].equal(k) and cache.cache_position == 3


def test_position_continues_or_goes_back_but_leaves_no_gap() -> None:
    cache, (k, v), (k2, v2) = KVCache(1, 8, 2, 4), pairs(1, 5), pairs(1, 2)
    cache.update(k, v, cache_position=0)
    all_k, _ = cache.update(k2, v2, cache_position=3)
    assert all_k.equal(torch.cat((k[:, :, :3], k2), 2)) and cache.cache_position == 5
    with pytest.raises(ValueError, match="cache_position=6 is outside the 5 tokens"):
        cache.update(k2, v2, cache_position=6)


def test_reset_and_reuse() -> None:
    cache, (k, v) = KVCache(4, 8, 2, 4), pairs(3, 5)
    cache.update(*pairs(2, 8))
    cache.reset()
    assert cache.cache_position == 0
    assert cache.update(k, v)[0].equal(k)  # another number of rows, and nothing of what was there


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 2, 1, 4), "max_batch_size=4"),
        ((1, 3, 1, 4), "2 heads"),
        ((1, 2, 1, 6), "width 4"),
        ((3, 2, 1, 4), "2 rows"),
    ],
)
def test_says_what_does_not_fit(shape: tuple[int, ...], message: str) -> None:
    cache = KVCache(4, 8, 2, 4)
    cache.update(*pairs(2, 1))
    with pytest.raises(ValueError, match=message):
        cache.update(torch.zeros(shape), torch.zeros(shape))


def test_holds_another_precision_than_the_model() -> None:
    cache, (k, v) = KVCache(1, 8, 2, 4, dtype=torch.bfloat16), pairs(1, 3)
    with torch.no_grad():
        all_k, _ = cache.update(k, v)
    assert all_k.dtype == torch.float32 and all_k.equal(k.bfloat16().float())
    cache.to(dtype=torch.float64)
    assert cache.get()[0].dtype == torch.float64 and cache.get()[0].equal(k.bfloat16().double())


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1]])
def test_gradients_reach_the_new_tokens(lengths: list[int]) -> None:
    """And what is returned is the same as without a gradient."""
    (first_k, first_v), (k, v) = pairs(2, 3), pairs(2, 2)
    results = []
    for needs_grad in (False, True):
        cache = KVCache(2, 8, 2, 4)
        cache.update(first_k, first_v)
        cache.truncate(lengths)
        results.append(cache.update(k.requires_grad_(needs_grad), v))
    (plain, _), (with_grad, _) = results
    for row, start in enumerate(lengths):
        assert plain[row, :, : start + 2].equal(with_grad[row, :, : start + 2])
    weight = torch.randn_like(k)
    found = torch.stack([with_grad[row, :, s : s + 2] for row, s in enumerate(lengths)])
    (grad,) = torch.autograd.grad((found * weight).sum(), k)
    assert grad.equal(weight)
    assert not cache.get()[0].requires_grad


def test_takes_what_is_not_contiguous() -> None:
    cache, (k, v) = KVCache(2, 8, 2, 4), pairs(2, 3)
    all_k, _ = cache.update(k.transpose(2, 3).contiguous().transpose(2, 3), v)
    assert all_k.equal(k)


def test_what_was_forgotten_hides_nothing_that_is_not_finite() -> None:
    """A weight of 0 times NaN would be NaN."""
    cache = KVCache(2, 8, 2, 4)
    cache.update(torch.full((2, 2, 6, 4), torch.nan), torch.full((2, 2, 6, 4), torch.nan))
    cache.reset()
    cache.update(*pairs(2, 4))
    cache.truncate([1, 4])
    for all_BGLP in cache.update(*pairs(2, 1)):
        assert all_BGLP.isfinite().all()


def test_a_refused_update_changes_nothing() -> None:
    cache = KVCache(2, 4, 2, 4)
    cache.update(*pairs(2, 3))
    with pytest.raises(ValueError, match="max_seq_len=4"):
        cache.update(*pairs(2, 5), cache_position=0)
    assert cache.lengths == [3, 3]
    assert cache.update(*pairs(1, 2), cache_position=0)[0].shape[0] == 1  # from the start, other rows may follow


def test_two_updates_under_a_gradient_of_the_queries_alone() -> None:
    cache, q = KVCache(1, 4, 1, 4), torch.randn(1, 1, 1, 4, requires_grad=True)
    total = sum((q @ cache.update(*pairs(1, 1, heads=1))[0].mT).sum() for _ in range(2))
    total.backward()
    assert q.grad is not None
