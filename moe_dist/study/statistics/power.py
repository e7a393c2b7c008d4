"""How large the noise of seeds is, and which effect so many seeds can show.

A paired comparison of n seeds whose differences have the standard deviation s finds an effect d with the probability

    power = P(|T| > t(1 - alpha / 2, n - 1)),   T noncentral t with n - 1 degrees of freedom and d sqrt(n) / s

(Cohen 1988, chapter 2). The minimum detectable effect is the d of power 80%. In a family of m comparisons after Holm
the first claim is made at alpha / m, so a single effect among m - 1 zeros needs the d of that alpha. scipy's noncentral
t is used, since the solver of statsmodels.stats.power goes astray at three and four seeds with alpha below 0.01.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from scipy import optimize, stats

from moe_dist.study.statistics.samples import (
    FEWEST_SEEDS,
    BySeed,
    Interval,
    check_finite,
    check_share,
    deviation_of,
)


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """deviation: standard deviation over seeds of the same point, pooled over points: the root of their squares about
    each point's mean over the degrees of freedom. interval: 95%, by the chi-squared law; None with fewer than two
    degrees. Points that share seeds move together, and count as one point for it."""

    deviation: float
    degrees: int
    points: int
    interval: Interval | None


def noise_floor(points: Mapping[str, BySeed]) -> NoiseFloor | None:
    """Over points, each with its values by seed, or its differences to a baseline by seed. Points with one seed say
    nothing; None if no point has two. Raises ValueError for values that are not finite."""
    for name, values in points.items():
        check_finite(values, name)
    several = [values for values in points.values() if len(values) > 1]
    if not several:
        return None
    squares = sum(deviation_of(list(values.values())) ** 2 * (len(values) - 1) for values in several)
    degrees = sum(len(values) - 1 for values in several)
    shared = len({seed for values in several for seed in values}) < sum(map(len, several))
    independent = max(len(values) - 1 for values in several) if shared else degrees
    deviation = math.sqrt(squares / degrees)
    interval = None
    if independent > 1:
        factors = independent / stats.chi2.ppf([0.975, 0.025], independent)
        interval = Interval(*(deviation * math.sqrt(factor) for factor in factors))
    return NoiseFloor(deviation, degrees, len(several), interval)


def power(effect: float, deviation: float, seeds: int, *, alpha: float = 0.05, comparisons: int = 1) -> float:
    """The probability that a paired two-sided t test shows the effect.

    effect, deviation: in the same unit; deviation is that of the differences by seed. comparisons: m of the family, of
    which this is Holm's first step. Raises ValueError for fewer than three seeds or numbers out of range.
    """
    _check(deviation, seeds, alpha, comparisons)
    if deviation == 0:
        return float(effect != 0)
    return _power(abs(effect) / deviation, seeds, alpha / comparisons)


def minimum_detectable(
    deviation: float, seeds: int, *, power: float = 0.8, alpha: float = 0.05, comparisons: int = 1
) -> float:
    """The smallest effect that is shown with that power; arguments and errors as in `power`. 0 where nothing varies."""
    _check(deviation, seeds, alpha, comparisons)
    check_share(power, "power")
    level = alpha / comparisons
    if power <= level:
        raise ValueError(f"power={power} is no more than the rate of false alarms, {level}: ask for more")
    return deviation * _size(power, seeds, level)


@cache  # the noncentral t takes milliseconds, and every family of a study asks for the same few
def _size(power: float, seeds: int, alpha: float) -> float:
    high = 1.0
    while _power(high, seeds, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda size: _power(size, seeds, alpha) - power, 0, high, xtol=1e-10))


def _power(size: float, seeds: int, alpha: float) -> float:
    """size: effect over deviation, not negative."""
    limit, shift = float(stats.t.isf(alpha / 2, seeds - 1)), size * math.sqrt(seeds)
    shown = float(stats.nct.sf(limit, seeds - 1, shift))
    if shift < 5:  # beyond, the wrong sign is shown in less than 3e-7, which scipy may give as NaN
        shown += float(stats.nct.cdf(-limit, seeds - 1, shift))
    return shown


def _check(deviation: float, seeds: int, alpha: float, comparisons: int) -> None:
    if seeds < FEWEST_SEEDS:
        raise ValueError(f"seeds={seeds}: with fewer than {FEWEST_SEEDS} no effect is tested; run more seeds")
    if not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"deviation={deviation}: give the standard deviation of the differences, 0 or more")
    if comparisons < 1:
        raise ValueError(f"comparisons={comparisons}: a family has at least one")
    check_share(alpha, "alpha")
