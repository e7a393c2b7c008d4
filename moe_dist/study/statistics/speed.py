"""Loss and throughput in one number: effective compute and effective speed against a baseline.

By a law L(C) = L0 + A C^-a (exchange.py), from the study's own ladder or given,

    effective compute ratio = ((L - L0) / (L_b - L0))^(-1 / a),    effective speed = that ratio times v / v_b

for a point of loss L and throughput v and a baseline of L_b and v_b (marin's form, with L0 = 1.6 and a = 0.0941, where
the best loss is the baseline's). A is not needed. Both are means over seeds of logarithms, seed by seed, with t
intervals; those hold the noise of the seeds and not that of the law, which `sensitivity` shows over L0 and a.

A speed of 1.05 reads: as much loss in the same time would have taken the baseline 1.05 times its throughput.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.study.statistics.paired import pair
from moe_dist.study.statistics.samples import BySeed, Interval, check_finite, t_interval

_LARGEST = 700.0  # that exp makes a number of


@dataclass(frozen=True, slots=True)
class Measured:
    """losses: nats, of each seed. throughputs: tokens a second, or any unit that all share, of each seed."""

    losses: BySeed
    throughputs: BySeed


@dataclass(frozen=True, slots=True)
class EffectiveSpeed:
    """Ratios to the baseline: compute by loss alone, throughput alone, and speed, their product; intervals 95%, None
    with fewer than three seeds that both have. unpaired: seeds that lack a number on one side and play no part."""

    name: str
    floor: float
    exponent: float
    seeds: tuple[int, ...]
    unpaired: tuple[int, ...]
    compute: float
    throughput: float
    speed: float
    compute_interval: Interval | None
    speed_interval: Interval | None


def effective_speeds(
    points: Mapping[str, Measured], baseline: Measured, *, floor: float, exponent: float
) -> list[EffectiveSpeed]:
    """floor: L0 in nats. exponent: a. Raises ValueError for a loss that is not above the floor, throughputs that are
    not positive, and a point that has no seed in common with the baseline."""
    if not (math.isfinite(exponent) and exponent > 0):
        raise ValueError(f"exponent={exponent}: a law of compute falls, so a is more than 0")
    before = _logarithms(baseline, floor, "baseline")
    found = []
    for name, point in points.items():
        excess, rate = (
            pair(mine, others, name).differences
            for mine, others in zip(_logarithms(point, floor, name), before, strict=True)
        )
        seeds = sorted(excess.keys() & rate.keys())
        every = set().union(point.losses, point.throughputs, baseline.losses, baseline.throughputs)
        if not seeds:
            raise ValueError(f"{name} has no seed with loss and throughput in common with the baseline")
        compute = [-excess[seed] / exponent for seed in seeds]
        speed = [gain + rate[seed] for gain, seed in zip(compute, seeds, strict=True)]
        found.append(
            EffectiveSpeed(
                *(name, floor, exponent, tuple(seeds), tuple(sorted(every.difference(seeds)))),
                compute=_mean(compute),
                throughput=_mean([rate[seed] for seed in seeds]),
                speed=_mean(speed),
                compute_interval=_interval(compute),
                speed_interval=_interval(speed),
            )
        )
    return found


def sensitivity(
    points: Mapping[str, Measured], baseline: Measured, *, floors: Sequence[float], exponents: Sequence[float]
) -> list[EffectiveSpeed]:
    """All points under every pair of L0 and a: the ends of the law's intervals, say. Errors as `effective_speeds`."""
    return [
        each
        for floor in floors
        for exponent in exponents
        for each in effective_speeds(points, baseline, floor=floor, exponent=exponent)
    ]


def _logarithms(point: Measured, floor: float, name: str) -> tuple[BySeed, BySeed]:
    """(log(L - L0), log v), of each seed."""
    for values, least, what in ((point.losses, floor, "loss"), (point.throughputs, 0.0, "throughput")):
        check_finite(values, name)
        for seed, value in values.items():
            if value <= least:
                raise ValueError(f"{name}, seed {seed}: a {what} of {value} is not above {least}, and has no ratio")
    losses = {seed: math.log(loss - floor) for seed, loss in point.losses.items()}
    return losses, {seed: math.log(value) for seed, value in point.throughputs.items()}


def _mean(logarithms: list[float]) -> float:
    return _exp(float(np.mean(logarithms)))


def _interval(logarithms: list[float]) -> Interval | None:
    interval = t_interval(logarithms)
    return interval and Interval(_exp(interval.low), _exp(interval.high))


def _exp(logarithm: float) -> float:
    """Infinite where it is beyond all numbers, as it is for an exponent near 0."""
    return math.exp(logarithm) if logarithm < _LARGEST else math.inf
