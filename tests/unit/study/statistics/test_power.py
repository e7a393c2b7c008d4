"""The noise floor, and the effect that so many seeds can show: against simulation, statsmodels and numpy."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from moe_dist.study.statistics.power import minimum_detectable, noise_floor, power
from tests.unit.study.statistics.planted import by_seed


@pytest.mark.parametrize("seeds, comparisons", [(3, 1), (5, 1), (8, 1), (3, 12), (5, 12)])
def test_the_minimum_detectable_effect_is_seen_in_four_of_five_simulations(seeds: int, comparisons: int) -> None:
    """40,000 paired studies with that effect; in a family the other effects are 0, and this one's claim is Holm's first
    unless another was made before it."""
    effect = minimum_detectable(0.02, seeds, comparisons=comparisons)
    differences = effect + 0.02 * np.random.default_rng(seeds).standard_normal((40_000, seeds))
    found = stats.ttest_1samp(differences, 0, axis=1).pvalue <= 0.05 / comparisons
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert power(effect, 0.02, seeds, comparisons=comparisons) == pytest.approx(0.8, abs=1e-6)
    assert power(-effect, 0.02, seeds, comparisons=comparisons) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("seeds", [4, 5, 10, 30])
def test_power_is_that_of_statsmodels(seeds: int) -> None:
    for size in (0.3, 0.6, 0.9):
        assert power(3 * size, 3.0, seeds) == pytest.approx(TTestPower().power(size, seeds, 0.05), abs=1e-6)


def test_the_noise_floor_is_pooled() -> None:
    """By hand: sums of squares 2 of three values and 8 of two, over 2 + 1 degrees; a single seed says nothing."""
    points = {"a": by_seed([1, 2, 3]), "b": by_seed([1, 5], first=10), "c": by_seed([7], first=20)}
    noise = noise_floor(points)
    assert (noise.deviation, noise.degrees, noise.points) == (pytest.approx((10 / 3) ** 0.5), 3, 2)
    limits = stats.chi2.ppf([0.975, 0.025], 3)
    assert [noise.interval.low, noise.interval.high] == pytest.approx(list((10 / limits) ** 0.5))
    assert noise_floor({"c": points["c"]}) is None and noise_floor({}) is None
    assert noise_floor({"b": points["b"]}).interval is None


def test_the_interval_of_the_noise_covers_it_also_where_points_share_seeds() -> None:
    """In 600 draws of 8 points with 5 seeds: with noise of their own, and with noise that is the seed's alone."""
    rng = np.random.default_rng(0)
    for shared, least in ((False, 0.93), (True, 0.93)):
        covered = 0
        for _ in range(600):
            noise = np.repeat(rng.standard_normal((1, 5)), 8, axis=0) if shared else rng.standard_normal((8, 5))
            first = 0 if shared else 5
            points = {f"{p}": by_seed(values, first=first * p) for p, values in enumerate(noise)}
            covered += 1.0 in noise_floor(points).interval
        assert least <= covered / 600 <= 0.98


def test_no_noise() -> None:
    assert minimum_detectable(0.0, 5) == 0
    assert power(0.1, 0.0, 5) == 1 and power(0.0, 0.0, 5) == 0
    assert noise_floor({"a": by_seed([1, 1, 1])}).deviation == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds=2: .* run more seeds"):
        minimum_detectable(0.1, 2)
    with pytest.raises(ValueError, match="deviation=nan"):
        power(0.1, float("nan"), 5)
    with pytest.raises(ValueError, match="comparisons=0"):
        power(0.1, 0.1, 5, comparisons=0)
    with pytest.raises(ValueError, match=r"power=0.01 .* 0.05"):
        minimum_detectable(0.1, 5, power=0.01)
    with pytest.raises(ValueError, match="a, seed 1: nan"):
        noise_floor({"a": by_seed([1, float("nan")])})
