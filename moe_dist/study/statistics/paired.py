"""Is a point's value another than the baseline's? Paired by seed, with a verdict.

Points that share weights and data order by seed differ by less than two seeds do, so the difference is taken seed by
seed and the seeds are the sample. For each point of the family that a question names:

| number              | how                                                                                           |
|---------------------|-----------------------------------------------------------------------------------------------|
| interval, bootstrap | of the mean difference (samples.py), each at 1 - alpha                                        |
| together            | t intervals at 1 - alpha / m: all m of a family hold at once with 1 - alpha (Bonferroni)      |
| p, p_holm           | paired t test, two-sided; adjusted over the family (Holm 1979)                                |
| p_equivalent        | two one-sided tests that the difference lies within ± the smallest that matters (Schuirmann   |
|                     | 1987), the larger of the two; adjusted over the family                                        |
| detectable          | the effect that this family shows with a power of 80% (power.py), at the deviation of the     |
|                     | differences pooled over its points                                                            |

| verdict             | when                                                                                          |
|---------------------|-----------------------------------------------------------------------------------------------|
| too few seeds       | fewer than three pairs                                                                        |
| equivalent          | p_equivalent <= alpha, also where the difference is not zero: it does not matter              |
| larger, smaller     | p_holm <= alpha                                                                               |
| not distinguishable | else: then all that is known is that the difference is smaller than the far end of `together` |

Measured on 20,000 families of 12 with 5 seeds and no effect: any is claimed in 4.6% where they share the baseline's
noise, in 5.2% where their differences are independent.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from scipy import special

from moe_dist.study.statistics.power import minimum_detectable, noise_floor
from moe_dist.study.statistics.samples import (
    FEWEST_SEEDS,
    BySeed,
    Interval,
    bootstrap_interval,
    check_finite,
    check_share,
    deviation_of,
    mean_of,
    t_interval,
)

Key = TypeVar("Key", bound=Hashable)


class Verdict(StrEnum):
    LARGER = "larger"
    SMALLER = "smaller"
    EQUIVALENT = "equivalent"
    NOT_DISTINGUISHABLE = "not distinguishable"
    TOO_FEW_SEEDS = "too few seeds"


@dataclass(frozen=True, slots=True)
class Pairs:
    """differences: point minus baseline, of the seeds that both have. only_point, only_baseline: seeds without their
    other half, which play no part."""

    differences: dict[int, float]
    only_point: tuple[int, ...]
    only_baseline: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one point with the baseline, as the tables above say; differences are in the metric's unit. Without any pair
    there is no mean, and with fewer than three no interval, p or bound."""

    name: str
    pairs: Pairs
    mean: float | None
    interval: Interval | None
    bootstrap: Interval | None
    together: Interval | None
    p: float | None
    p_holm: float | None
    p_equivalent: float | None
    detectable: float | None
    verdict: Verdict

    @property
    def at_most(self) -> float | None:
        """The largest difference, of either sign, that the family's intervals allow."""
        return None if self.together is None else self.together.furthest


def pair(point: BySeed, baseline: BySeed, name: str = "point") -> Pairs:
    """Seed by seed. Raises ValueError that names what is not finite."""
    check_finite(point, name)
    check_finite(baseline, "baseline")
    return Pairs(
        {seed: point[seed] - baseline[seed] for seed in sorted(point.keys() & baseline.keys())},
        tuple(sorted(point.keys() - baseline.keys())),
        tuple(sorted(baseline.keys() - point.keys())),
    )


def compare(
    points: Mapping[str, BySeed], baseline: BySeed, *, matters: float | None = None, alpha: float = 0.05
) -> list[Comparison]:
    """A family of points, each with the baseline, in their order; arguments and errors as `compare_pairs`, and
    ValueError for values that are not finite."""
    pairs = {name: pair(values, baseline, name) for name, values in points.items()}
    return compare_pairs(pairs, matters=matters, alpha=alpha)


def compare_pairs(pairs: Mapping[str, Pairs], *, matters: float | None = None, alpha: float = 0.05) -> list[Comparison]:
    """A family of differences, each to a baseline of its own, in their order. The family is what the question named
    before the runs; points with fewer than three pairs make no claim and do not count in it.

    matters: the smallest difference that matters, in the metric's unit; None: nothing is called equivalent. alpha: how
    often any claim of the family may be false. Raises ValueError for numbers out of range.
    """
    check_share(alpha, "alpha")
    if matters is not None and not (math.isfinite(matters) and matters > 0):
        raise ValueError(f"matters={matters}: the smallest difference that matters is more than 0, or None")
    tested = {name: each.differences for name, each in pairs.items() if len(each.differences) >= FEWEST_SEEDS}
    p = {name: p_of_zero(list(differences.values())) for name, differences in tested.items()}
    p_holm = holm(p)
    within = {} if matters is None else {name: p_within(list(d.values()), matters) for name, d in tested.items()}
    within = holm(within)
    noise = noise_floor(tested)
    found = []
    for name, each in pairs.items():
        differences = list(each.differences.values())
        mean = mean_of(differences) if differences else None
        detectable = together = None
        if name in tested and noise is not None:
            detectable = minimum_detectable(noise.deviation, len(differences), alpha=alpha, comparisons=len(tested))
            together = t_interval(differences, 1 - alpha / len(tested))
        found.append(
            Comparison(
                name,
                each,
                mean,
                interval=t_interval(differences, 1 - alpha),
                bootstrap=bootstrap_interval(differences, 1 - alpha),
                together=together,
                p=p.get(name),
                p_holm=p_holm.get(name),
                p_equivalent=within.get(name),
                detectable=detectable,
                verdict=_verdict(mean, p_holm.get(name), within.get(name), alpha),
            )
        )
    return found


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p values by Holm's step-down rule: claims at p <= alpha keep the rate of any false one below alpha.

    The i-th smallest of m, from 0, becomes the largest of (m - i) p_i and those before it, at most 1; as multipletests
    of statsmodels, which collects garbage at every call, a tenth of a second each.
    """
    reached, adjusted = 0.0, {}
    for place, key in enumerate(sorted(p, key=lambda key: p[key])):
        reached = max(reached, min(1.0, (len(p) - place) * p[key]))
        adjusted[key] = reached
    return {key: adjusted[key] for key in p}


def p_of_zero(differences: list[float]) -> float:
    """Two-sided, of the mean difference being zero. Where all differences are equal: 1 if they are zero, else 0."""
    return 2 * min(0.5, p_beyond(differences, 0.0), p_beyond([-each for each in differences], 0.0))


def p_within(differences: list[float], matters: float) -> float:
    """Of the mean difference being as large as `matters` or larger, of either sign: small where it is shown to lie
    within."""
    return max(p_beyond(differences, -matters), p_beyond([-each for each in differences], -matters))


def p_beyond(differences: list[float], limit: float) -> float:
    """One-sided p of the mean being `limit` or less."""
    excess = mean_of(differences) - limit
    error = deviation_of(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0 if excess > 0 else 1.0
    return float(special.stdtr(len(differences) - 1, -excess / error))


def _verdict(mean: float | None, p_holm: float | None, p_equivalent: float | None, alpha: float) -> Verdict:
    if mean is None or p_holm is None:
        return Verdict.TOO_FEW_SEEDS
    if p_equivalent is not None and p_equivalent <= alpha:
        return Verdict.EQUIVALENT
    if p_holm <= alpha:
        return Verdict.LARGER if mean > 0 else Verdict.SMALLER
    return Verdict.NOT_DISTINGUISHABLE
