"""Effective compute and speed: published constants by hand, planted truths, and what cannot be."""

import numpy as np
import pytest

from moe_dist.study.statistics.exchange import Law
from moe_dist.study.statistics.speed import Measured, effective_speeds, sensitivity
from tests.unit.study.statistics.planted import by_seed


def test_published_constants_by_hand() -> None:
    """marin's L0 = 1.6 and a = 0.0941: 0.005 nats above a best of 3.0 cost 3.7% of the compute, which 10% more
    throughput outweigh."""
    best, other = Measured({0: 3.0}, {0: 100.0}), Measured({0: 3.005}, {0: 110.0})
    (found,) = effective_speeds({"1.25": other}, best, floor=1.6, exponent=0.0941)
    assert found.compute == pytest.approx((1.405 / 1.4) ** (-1 / 0.0941)) == pytest.approx(0.9628, abs=1e-4)
    assert found.throughput == pytest.approx(1.1)
    assert found.speed == pytest.approx(1.1 * found.compute)
    assert found.seeds == (0,) and found.compute_interval is None and found.speed_interval is None


def test_effective_compute_is_that_of_the_law() -> None:
    law = Law(1.8, 40.0, 0.2)
    baseline, point = (Measured({0: law.loss(c)}, {0: 1.0}) for c in (1e8, 1.7e8))
    (found,) = effective_speeds({"a": point}, baseline, floor=1.8, exponent=0.2)
    assert found.compute == found.speed == pytest.approx(1.7)


def test_planted_speeds_are_covered() -> None:
    """In 200 draws of five seeds: losses that share their seeds' noise, throughputs that do not."""
    rng, covered = np.random.default_rng(0), {"compute": 0, "speed": 0}
    truth = {"compute": (1.52 / 1.5) ** (-1 / 0.1), "speed": (1.52 / 1.5) ** (-1 / 0.1) * 1.08}
    for _ in range(200):
        common = 0.02 * rng.standard_normal(5)
        losses = [by_seed(1.6 + excess * np.exp(common + 0.002 * rng.standard_normal(5))) for excess in (1.5, 1.52)]
        rates = [by_seed(rate * np.exp(0.01 * rng.standard_normal(5))) for rate in (100.0, 108.0)]
        baseline, point = map(Measured, losses, rates)
        (found,) = effective_speeds({"a": point}, baseline, floor=1.6, exponent=0.1)
        covered["compute"] += truth["compute"] in found.compute_interval
        covered["speed"] += truth["speed"] in found.speed_interval
    assert all(0.90 <= number / 200 <= 0.98 for number in covered.values()), covered


def test_near_no_exponent_any_loss_is_worth_any_compute() -> None:
    rates = by_seed([1.0, 1.0, 1.0])
    best, other = Measured(by_seed([3.0, 3.1, 3.2]), rates), Measured(by_seed([2.0, 2.0, 2.0]), rates)
    (better,) = effective_speeds({"a": other}, best, floor=1.6, exponent=1e-5)
    (worse,) = effective_speeds({"a": best}, other, floor=1.6, exponent=1e-5)
    assert (better.compute, better.speed_interval.high, worse.compute) == (np.inf, np.inf, 0.0)


def test_sensitivity_goes_over_all_pairs() -> None:
    best, other = Measured({0: 3.0}, {0: 1.0}), Measured({0: 3.1}, {0: 1.0})
    found = sensitivity({"a": other}, best, floors=(1.5, 1.8), exponents=(0.05, 0.1))
    assert [(each.floor, each.exponent) for each in found] == [(1.5, 0.05), (1.5, 0.1), (1.8, 0.05), (1.8, 0.1)]
    assert found[1].compute == pytest.approx((1.6 / 1.5) ** -10)
    assert min(each.compute for each in found) == found[2].compute < found[1].compute


def test_missing_seeds_are_named() -> None:
    baseline = Measured({0: 3.0, 1: 3.1, 2: 3.2, 3: 3.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    point = Measured({1: 3.0, 2: 3.0, 3: 3.1, 4: 3.0}, {0: 1.0, 1: 1.1, 2: 1.1})
    (found,) = effective_speeds({"a": point}, baseline, floor=1.0, exponent=0.1)
    assert found.seeds == (1, 2) and found.unpaired == (0, 3, 4) and found.speed_interval is None


@pytest.mark.parametrize(
    "point, options, said",
    [
        (Measured({0: 1.6}, {0: 1.0}), {}, r"a, seed 0: a loss of 1.6 is not above 1.6"),
        (Measured({0: 3.0}, {0: 0.0}), {}, r"a, seed 0: a throughput of 0.0 is not above"),
        (Measured({0: float("nan")}, {0: 1.0}), {}, "a, seed 0: nan"),
        (Measured({1: 3.0}, {1: 1.0}), {}, "a has no seed with loss and throughput in common"),
        (Measured({0: 3.0}, {0: 1.0}), dict(exponent=-0.1), r"exponent=-0.1"),
    ],
)
def test_what_cannot_be_is_refused(point: Measured, options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effective_speeds({"a": point}, Measured({0: 3.0}, {0: 1.0}), **dict(floor=1.6, exponent=0.1) | options)
