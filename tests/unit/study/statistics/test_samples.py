"""Intervals of a mean: coverage, and against scipy."""

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.statistics.samples import (
    Interval,
    bootstrap_interval,
    check_finite,
    draws,
    t_interval,
    weighted_quantile,
)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_intervals_cover_the_mean(seeds: int) -> None:
    """95% of 200 samples; t of 600."""
    samples = np.random.default_rng(seeds).standard_normal((600, seeds))
    for interval, count in ((t_interval, 600), (bootstrap_interval, 200)):
        covered = sum(0 in interval(list(values)) for values in samples[:count]) / count
        assert 0.90 <= covered <= 0.98, interval


def test_the_bootstrap_of_skewed_values_covers_better_than_t() -> None:
    samples = np.random.default_rng(0).exponential(size=(300, 5))
    covered = {f: np.mean([1.0 in f(list(values)) for values in samples]) for f in (t_interval, bootstrap_interval)}
    assert covered[bootstrap_interval] >= 0.9 > covered[t_interval]


def test_t_is_scipys() -> None:
    values = [3.1, 2.9, 3.4, 3.0]
    got, expected = t_interval(values, 0.9), stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
    assert 3.1 in got and 3.6 not in got and got.furthest == got.high


@pytest.mark.parametrize("seeds, close", [(4, 0.03), (6, 0.02), (12, 0.05)])
def test_the_studentized_bootstrap_is_scipys_bootstrap_of_t(seeds: int, close: float) -> None:
    """scipy draws percentiles of t* at random, 100,000 times; we take all draws up to eight seeds, with their
    probabilities. Of 12 ours are random too."""
    values = np.random.default_rng(seeds).exponential(size=seeds)
    mean, error = values.mean(), values.std(ddof=1) / seeds**0.5

    def t(sample: np.ndarray, axis: int) -> np.ndarray:
        spread = sample.std(axis=axis, ddof=1)
        return (sample.mean(axis=axis) - mean) / np.where(spread > 1e-12, spread / seeds**0.5, np.nan)

    options = dict(
        n_resamples=100_000, method="percentile", confidence_level=0.5, rng=np.random.default_rng(1), batch=10_000
    )
    drawn = stats.bootstrap((values,), t, **options).bootstrap_distribution
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    got = bootstrap_interval(list(values))
    assert got.low == pytest.approx(mean - high * error, abs=close * error)
    assert got.high == pytest.approx(mean - low * error, abs=close * error * max(1, abs(low)))


def test_three_seeds_by_hand() -> None:
    """Of (0, 0, 3), draws with two zeros or two threes have means 1 and 2 and the same deviation sqrt(3) as the values:
    t* is 0 or 1 / (sqrt(3) / sqrt(3)) = 1, so the half width is one error."""
    assert bootstrap_interval([0.0, 0.0, 3.0]) == Interval(pytest.approx(0.0), pytest.approx(2.0))


def test_all_draws_and_their_probabilities() -> None:
    counts, weights = draws(2)
    assert counts.tolist() == [[2, 0], [1, 1], [0, 2]] and weights.tolist() == [0.25, 0.5, 0.25]
    for seeds, number in ((3, 10), (5, 126), (8, 6435), (9, 10_000)):
        counts, weights = draws(seeds)
        assert len(counts) == number and weights.sum() == pytest.approx(1) and (counts.sum(1) == seeds).all()
        assert weights @ counts == pytest.approx(np.ones(seeds), abs=0.05)
    counts, weights = draws(5)
    values = np.array([1.0, 2, 4, 8, 16])
    deviation = np.sqrt(weights @ (counts @ values / 5 - values.mean()) ** 2)
    assert deviation == pytest.approx(values.std() / 5**0.5)


def test_weighted_quantile() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
    assert [weighted_quantile(values, weights, q) for q in (0.1, 0.5, 0.6, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_fewer_than_three_values_and_equal_ones() -> None:
    for interval in (t_interval, bootstrap_interval):
        assert interval([]) is None and interval([1.0]) is None and interval([1.0, 2.0]) is None
        assert interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5)
        assert interval([0.1, 0.1, 0.1]) == Interval(0.1, 0.1)  # a third of whose sum is 0.10000000000000002
        with pytest.raises(ValueError, match="confidence=95"):
            interval([1.0, 2.0, 3.0], 95)


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(ValueError, match=r"factor 1.0, seed 3: nan is no measurement"):
        check_finite({1: 2.0, 3: float("nan")}, "factor 1.0")
    with pytest.raises(ValueError, match="seed 1: inf"):
        check_finite({1: float("inf")}, "factor 1.0")
