"""Scaling with the capacity factor beside: planted exponents, and grids that do not allow them."""

import numpy as np
import pytest

from moe_dist.study.statistics.scaling import Observation, scaling

FACTORS = {None: 0.0, 1.0: 0.01, 0.5: 0.04}


def runs(
    rng: np.random.Generator,
    sizes: tuple[float, ...] = (1e6, 4e6, 16e6),
    experts: tuple[float, ...] = (4, 8, 16),
    tokens: tuple[float, ...] | None = (1e7, 4e7),
    seeds: int = 3,
) -> list[Observation]:
    """log(L - 1.5) = 3 - 0.1 log N - 0.05 log E - 0.08 log D + g(factor) + noise; tokens None: 20 for a parameter."""
    shared, found = 0.02 * rng.standard_normal(seeds), []
    for size in sizes:
        for number in experts:
            for count in tokens or (20 * size,):
                for factor, change in FACTORS.items():
                    for seed in range(seeds):
                        height = 3 - 0.1 * np.log(size) - 0.05 * np.log(number) - 0.08 * np.log(count) + change
                        loss = 1.5 + np.exp(height + shared[seed] + 0.005 * rng.standard_normal())
                        found.append(Observation(size, number, count, factor, seed, float(loss)))
    return found


def test_planted_exponents_are_covered() -> None:
    """200 draws; and the numbers of a factor."""
    rng = np.random.default_rng(0)
    covered = dict.fromkeys(("active_parameters", "experts", "tokens", "0.5", "1.0"), 0)
    truth = {"active_parameters": -0.1, "experts": -0.05, "tokens": -0.08}
    for _ in range(200):
        found = scaling(runs(rng), floor=1.5)
        for name, value in truth.items():
            covered[name] += value in found.exponents[name].interval
        for factor in (0.5, 1.0):
            covered[f"{factor}"] += FACTORS[factor] in found.factors[factor].interval
    assert all(0.90 <= number / 200 <= 0.98 for number in covered.values()), covered
    assert found.left_out == {} and found.degrees == 162 - 1 - 2 - 2 - 3
    assert found.deviation == pytest.approx(0.005, rel=0.2)
    assert found.notes == ("tokens has two values: nothing tests that its law is a power",)


def test_the_baseline_is_a_choice() -> None:
    found = scaling(runs(np.random.default_rng(1)), floor=1.5, baseline=0.5)
    assert set(found.factors) == {None, 1.0}
    assert found.factors[None].value == pytest.approx(-0.04, abs=0.004)


def test_what_the_grid_does_not_allow_is_left_out_with_the_reason() -> None:
    found = scaling(runs(np.random.default_rng(2), experts=(8,), tokens=None), floor=1.5)
    assert set(found.exponents) == {"active_parameters"}
    assert found.left_out["experts"] == "has one value, 8"
    assert found.left_out["tokens"].startswith("follows from active_parameters (R^2 = 1.000)")
    assert found.exponents["active_parameters"].value == pytest.approx(-0.18, abs=0.01)  # of both


def test_a_factor_that_changes_with_the_size_takes_its_place() -> None:
    sizes = {None: 1e6, 1.0: 2e6, 0.5: 4e6}
    confounded = [
        Observation(sizes[each.factor], each.experts, each.tokens, each.factor, each.seed, each.loss)
        for each in runs(np.random.default_rng(3), sizes=(1e6,))
    ]
    found = scaling(confounded, floor=1.5)
    assert "the capacity factor or the seed" in found.left_out["active_parameters"]


def test_fewer_than_three_seeds_give_no_interval() -> None:
    found = scaling(runs(np.random.default_rng(4), seeds=2), floor=1.5)
    assert found.exponents["experts"].interval is None and found.factors[0.5].interval is None
    assert found.exponents["experts"].value == pytest.approx(-0.05, abs=0.01)
    assert "2 seeds give no intervals: 3 are needed" in found.notes


def test_what_cannot_be_is_refused() -> None:
    good = Observation(1e6, 4, 1e7, None, 0, 3.0)
    with pytest.raises(ValueError, match="no run to fit"):
        scaling([])
    with pytest.raises(ValueError, match=r"baseline's capacity factor 2.0: name one of \[None\]"):
        scaling([good], baseline=2.0)
    with pytest.raises(ValueError, match="1 runs for 1 terms"):
        scaling([good])
    with pytest.raises(ValueError, match=r"seed 0, factor None: a loss of 3.0 is not above the floor L0 = 3.5"):
        scaling([good], floor=3.5)
    with pytest.raises(ValueError, match="experts=0 has no logarithm"):
        scaling([Observation(1e6, 0, 1e7, None, 0, 3.0)])
