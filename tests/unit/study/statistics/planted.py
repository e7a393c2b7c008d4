"""Synthetic studies with a known truth: values by seed, where the points of a seed share its noise."""

from collections.abc import Sequence

import numpy as np

from moe_dist.study.statistics.samples import BySeed


def by_seed(values: Sequence[float], first: int = 0) -> dict[int, float]:
    return {first + number: float(value) for number, value in enumerate(values)}


def planted(
    rng: np.random.Generator, means: Sequence[float], seeds: int, own: float = 0.01, shared: float = 0.1
) -> list[BySeed]:
    """Normal noise: `shared` is what all points of a seed have in common, `own` is each point's."""
    common = shared * rng.standard_normal(seeds)
    return [by_seed(mean + common + own * rng.standard_normal(seeds)) for mean in means]
