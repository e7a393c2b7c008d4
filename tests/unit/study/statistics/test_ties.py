"""Groups of points that cannot be told apart."""

import numpy as np
import pytest

from moe_dist.study.statistics.ties import groups
from tests.unit.study.statistics.planted import by_seed, planted


def named(means: list[float], seed: int = 0, seeds: int = 5, **noise: float) -> dict[str, dict[int, float]]:
    points = planted(np.random.default_rng(seed), means, seeds, **noise)
    return {f"{mean}": dict(values) for mean, values in zip(means, points, strict=True)}


def test_what_differs_is_in_order_and_what_does_not_is_one_group() -> None:
    found = groups(named([3.5, 3.0, 3.001, 2.0], own=0.004))
    assert found.groups == (("2.0",), ("3.0", "3.001"), ("3.5",))
    assert ("2.0", "3.5") in found.apart and ("3.0", "3.001") not in found.apart and len(found.apart) == 5


def test_equal_points_are_rarely_ranked() -> None:
    """Five points of the same truth: one group in at least 93% of 200 draws."""
    same = [3.0, 3.0000001, 3.0000002, 3.0000003, 3.0000004]
    assert sum(len(groups(named(same, seed)).groups) == 1 for seed in range(200)) / 200 >= 0.93


def test_a_chain_is_one_group() -> None:
    """0 and 4 are told apart, neither from 2: each step is 2 ± 2, both together 4 ± 0.4."""
    steps = np.array([-2.0, 0.5, 2.0, -1.0, 0.5])
    low, middle = np.zeros(5), 2 + steps
    high = 4 + np.array([0.2, -0.2, 0.1, -0.1, 0.0])
    found = groups({"high": by_seed(high), "middle": by_seed(middle), "low": by_seed(low)})
    assert found.groups == (("high", "middle", "low"),) and found.apart == {("low", "high")}


def test_a_tie_around_a_third_point_is_one_group() -> None:
    """a below b below c, and a and c not told apart since they have too few seeds in common: there is no order."""
    a = {seed: 1.0 + 0.001 * seed for seed in range(3)}
    b = dict.fromkeys(range(6), 2.0)
    c = {seed: 3.0 + 0.001 * seed for seed in range(3, 6)}
    found = groups({"a": a, "b": b, "c": c})
    assert found.apart == {("a", "b"), ("b", "c")} and found.too_few == (("a", "c"),)
    assert found.groups == (("a", "b", "c"),)


def test_too_few_seeds_tell_nothing_apart() -> None:
    found = groups({"a": by_seed([1.0, 1.0]), "b": by_seed([9.0, 9.0])})
    assert found.groups == (("a", "b"),) and found.too_few == (("a", "b"),)
    assert groups({"a": by_seed([1.0])}).groups == (("a",),) and groups({}).groups == ()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="b has no value"):
        groups({"a": by_seed([1.0]), "b": {}})
    with pytest.raises(ValueError, match="b, seed 0: nan"):
        groups({"a": by_seed([1.0]), "b": by_seed([float("nan")])})
