"""Values by seed, intervals of their mean, and which seeds a draw of the bootstrap takes.

| interval    | how                                                                                                  |
|-------------|------------------------------------------------------------------------------------------------------|
| t           | mean ± t(n - 1) s / sqrt(n): exact where the values are normal                                       |
| studentized | mean - q s / sqrt(n), with q the quantiles of t* = (mean* - mean) / (s* / sqrt(n)) over all draws of n |
|             | seeds with repetition (Efron and Tibshirani 1993, chapter 12.5); draws in which all values are equal |
|             | have no t* and are left out; at n = 3, where they are a ninth of all, one q of |t*| for both sides   |

Measured coverage of 95% intervals over 4,000 samples (8 seeds: 1,500) of a normal law, Student's t with three degrees
of freedom, and an exponential law:

| seeds | t                | studentized          | BCa              | percentile       |
|-------|------------------|----------------------|------------------|------------------|
| 3     | 95.3, 96.1, 88.0 | 92.8, 93.6, 86.9     | 72.9, 71.3, 67.9 | 75.4, 75.1, 69.7 |
| 4     | 95.4, 95.6, 87.5 | 94.4, 94.8, 92.4     | 78.7, 78.0, 75.5 | 79.0, 78.5, 74.5 |
| 5     | 95.6, 96.5, 89.0 | 95.2, 95.3, 93.2     | 84.5, 82.1, 81.0 | 84.2, 83.9, 79.8 |
| 8     | 95.3, 96.1, 89.7 | 95.7, 93.7, 94.1     | 90.4, 85.0, 86.3 | 90.6, 87.6, 85.2 |

So bootstrap intervals here are studentized. Those of the percentile kind lie within the values, of which three are on
one side of the truth in a quarter of all samples. With skewed values studentized intervals are the better ones from
four seeds on; for normal ones they are no better than t and wider: by 74% at 4 seeds, 32% at 5, 9% at 8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray
from scipy import special

BySeed = Mapping[int, float]
"""A measured number of each seed."""

FEWEST_SEEDS = 3
"""With fewer there is no interval."""

Floats = NDArray[np.float64]
_ALL_DRAWS = 8
_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def furthest(self) -> float:
        """The largest size that it allows."""
        return max(abs(self.low), abs(self.high))


def check_finite(values: BySeed, name: str) -> None:
    """Raises ValueError that names point, seed and value if one is NaN or infinite."""
    for seed, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}, seed {seed}: {value} is no measurement; leave the point out and say so")


def check_share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} has to be between 0 and 1")


def mean_of(values: Sequence[float]) -> float:
    """Of equal values that value: their sum over their number may miss it in the last digit."""
    return float(values[0]) if min(values) == max(values) else float(np.mean(values))


def deviation_of(values: Sequence[float]) -> float:
    """Sample standard deviation, of at least two; of equal values 0, which rounding may miss."""
    return 0.0 if min(values) == max(values) else float(np.std(values, ddof=1))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Of the mean, in the values' unit; None of fewer than three values. Equal values give an interval of one number.
    Raises ValueError for a confidence that is none."""
    check_share(confidence, "confidence")
    count = len(values)
    if count < FEWEST_SEEDS:
        return None
    mean, error = mean_of(values), deviation_of(values) / math.sqrt(count)
    reach = float(special.stdtrit(count - 1, (1 + confidence) / 2)) * error
    return Interval(mean - reach, mean + reach)


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The studentized one, as `t_interval`. Up to 8 values all draws are taken, each with its probability, and beyond
    10,000 random ones, the same for the same number of values."""
    check_share(confidence, "confidence")
    count = len(values)
    if count < FEWEST_SEEDS:
        return None
    mean, spread = mean_of(values), deviation_of(values)
    if spread == 0:
        return Interval(mean, mean)
    counts_DN, weights_D = draws(count)
    scaled_N = (np.asarray(values) - mean) / spread
    means_D = counts_DN @ scaled_N / count
    spreads_D = np.sqrt(np.maximum(0, counts_DN @ scaled_N**2 / count - means_D**2) * count / (count - 1))
    vary_D = spreads_D > 1e-7
    t_D, weights_D = means_D[vary_D] / spreads_D[vary_D], weights_D[vary_D] / weights_D[vary_D].sum()
    tail = (1 - confidence) / 2
    if count == FEWEST_SEEDS:
        high = weighted_quantile(np.abs(t_D), weights_D, confidence)
        low = -high
    else:
        low, high = weighted_quantile(t_D, weights_D, tail), weighted_quantile(t_D, weights_D, 1 - tail)
    return Interval(mean - high * spread, mean - low * spread)


@cache
def draws(count: int) -> tuple[Floats, Floats]:
    """([D, N] how often a draw takes each of `count` values, [D] its probability). Of two values:

    ([[2, 0], [1, 1], [0, 2]], [0.25, 0.5, 0.25])
    """
    if count > _ALL_DRAWS:
        taken = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
        counts_DN, weights_D = taken.astype(np.float64), np.full(_DRAWS, 1 / _DRAWS)
    else:
        sets = combinations_with_replacement(range(count), count)
        taken = np.stack([np.bincount(each, minlength=count) for each in sets])
        counts_DN = taken.astype(np.float64)
        factorials = np.array([math.factorial(number) for number in range(count + 1)])
        weights_D = factorials[count] / factorials[taken].prod(1) / float(count) ** count
    counts_DN.flags.writeable = weights_D.flags.writeable = False
    return counts_DN, weights_D


def weighted_quantile(values_D: Floats, weights_D: Floats, share: float) -> float:
    """The smallest value up to which there is at least that share of the weights."""
    order = np.argsort(values_D, kind="stable")
    reached = np.cumsum(weights_D[order])
    return float(values_D[order[min(int(np.searchsorted(reached, share - 1e-12)), len(order) - 1)]])
