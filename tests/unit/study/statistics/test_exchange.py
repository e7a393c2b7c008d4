"""The law of loss in compute: planted constants come back, and the largest size is predicted and scored."""

import math

import numpy as np
import pytest
from scipy import optimize

from moe_dist.study.statistics.exchange import Law, Rung, fit_law, hold_out
from tests.unit.study.statistics.planted import by_seed

LAW = Law(floor=1.8, scale=40.0, exponent=0.2)
SIZES = [1e6 * 10 ** (step / 2) for step in range(6)]


def ladder(rng: np.random.Generator, seeds: int, own: float = 1e-3, shared: float = 2e-3, law: Law = LAW) -> list[Rung]:
    common = shared * rng.standard_normal(seeds)
    noise = common + own * rng.standard_normal((len(SIZES), seeds))
    return [Rung(size, by_seed(law.loss(size) * np.exp(row))) for size, row in zip(SIZES, noise, strict=True)]


def test_a_law_without_noise_comes_back() -> None:
    exact = fit_law([Rung(size, {0: LAW.loss(size)}) for size in SIZES[:4]])
    assert (exact.law.floor, exact.law.scale, exact.law.exponent) == pytest.approx((1.8, 40.0, 0.2), rel=1e-4)
    assert exact.exponent is None and exact.floor is None and exact.draws == () and exact.residual < 1e-6


def test_planted_exponents_are_covered() -> None:
    """95% intervals of the exponent in 200 draws of a ladder, and of the largest size's loss, held out."""
    rng, covered, inside, unseen = np.random.default_rng(0), 0, 0, 0
    for _ in range(200):
        rungs = ladder(rng, seeds=5)
        fit = fit_law(rungs, draws=60)
        covered += LAW.exponent in fit.exponent
        unseen += abs(fit.law.exponent - LAW.exponent) > 0.05
    for _ in range(40):
        inside += hold_out(ladder(rng, seeds=5), draws=60).inside
    assert 0.90 <= covered / 200 <= 0.98 and unseen == 0
    assert inside / 40 >= 0.88


def test_the_fit_is_the_least_huber_loss() -> None:
    """Against a search without slopes, from where the law is planted, with an outlier of 10%."""
    rungs = ladder(np.random.default_rng(1), seeds=3)
    rungs[2].losses[1] *= 1.1  # type: ignore[index]
    points = [(rung.compute, loss) for rung in rungs for loss in rung.losses.values()]

    def huber(at: np.ndarray) -> float:
        law = Law(at[0], at[1] * 1e6 ** at[2], at[2])
        sizes = [abs(math.log(loss) - math.log(law.loss(compute))) for compute, loss in points]
        return sum(size**2 / 2 if size <= 1e-3 else 1e-3 * (size - 5e-4) for size in sizes)

    start = [1.8, 40.0 * 1e6**-0.2, 0.2]
    options = dict(maxiter=20_000, maxfev=20_000, xatol=1e-10, fatol=1e-16)
    best = optimize.minimize(huber, start, method="Nelder-Mead", options=options)
    law = fit_law(rungs, draws=1).law
    assert huber([law.floor, law.scale * 1e6**-law.exponent, law.exponent]) <= best.fun * (1 + 1e-6)
    assert law.exponent == pytest.approx(0.2, abs=0.02)


def test_a_broken_law_is_seen_at_the_largest_size() -> None:
    rungs = ladder(np.random.default_rng(2), seeds=5)
    right = hold_out(rungs, draws=100)
    assert right.inside and abs(right.error) < 0.01 and right.compute == SIZES[-1] and right.fit.sizes == 5
    worse = Rung(SIZES[-1], {seed: 1.03 * loss for seed, loss in rungs[-1].losses.items()})
    wrong = hold_out([worse, *rungs[:-1]], draws=100)
    assert not wrong.inside and wrong.error == pytest.approx(1.03 * (1 + right.error) - 1, abs=1e-9)
    assert wrong.predicted == pytest.approx(right.predicted) and right.predicted in right.interval


def test_noise_that_sizes_share_widens_the_floor() -> None:
    """A seed whose losses are all 1% higher moves L0, and an interval that took runs for the unit would not know."""
    alone = fit_law(ladder(np.random.default_rng(3), 5, own=1e-3, shared=0.0), draws=100)
    shared = fit_law(ladder(np.random.default_rng(3), 5, own=1e-3, shared=1e-2), draws=100)
    assert shared.floor.high - shared.floor.low > 2 * (alone.floor.high - alone.floor.low)


def test_missing_runs_and_few_seeds() -> None:
    rungs = ladder(np.random.default_rng(4), seeds=4)
    del rungs[1].losses[2], rungs[5].losses[0]  # type: ignore[attr-defined]
    fit = fit_law(rungs, draws=50)
    assert LAW.exponent in fit.exponent and (fit.sizes, fit.seeds) == (6, 4)
    few = hold_out(ladder(np.random.default_rng(5), seeds=2))
    assert few.interval is None and few.inside is None and few.fit.exponent is None
    assert few.predicted == pytest.approx(few.measured, rel=0.02)


@pytest.mark.parametrize(
    "rungs, said",
    [
        ([Rung(1.0, {0: 2.0}), Rung(2.0, {0: 1.9})], "2 different values of compute in 2 rungs: at least 3"),
        ([Rung(1.0, {0: 2.0})] * 3, "1 different values of compute in 3 rungs"),
        ([Rung(1.0, {0: 2.0}), Rung(0.0, {0: 1.9}), Rung(3.0, {0: 1.8})], r"compute=0.0 has no logarithm"),
        ([Rung(1.0, {0: 2.0}), Rung(2.0, {1: math.nan}), Rung(3.0, {0: 1.8})], "compute 2, seed 1: nan"),
        ([Rung(1.0, {0: 2.0}), Rung(2.0, {}), Rung(3.0, {0: 1.8})], "compute 2: a rung needs losses"),
        ([Rung(1.0, {0: 2.0}), Rung(2.0, {0: -1.0}), Rung(3.0, {0: 1.8})], "all above 0"),
    ],
)
def test_what_cannot_be_is_refused(rungs: list[Rung], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_law(rungs)


@pytest.mark.parametrize(
    "losses, said",
    [
        ([2.0, 2.0, 2.0, 2.0], r"losses fall by 0\.0\d% .* so no law of compute can be told; take sizes further"),
        ([2.0, 2.01, 2.02, 2.05], r"losses fall by 0\.00% .* no law of compute can be told"),
        ([2.1, 2.0, 2.0, 2.0], r"fall from the smallest size alone \(by an exponent of [\d.]+\)"),
    ],
)
def test_losses_that_do_not_fall_as_a_law_have_none(losses: list[float], said: str) -> None:
    """Where a fit would say an exponent of 0.00004, or of 5."""
    rng = np.random.default_rng(1)
    rungs = [
        Rung(size, by_seed(loss + 1e-3 * rng.standard_normal(4))) for size, loss in zip(SIZES[:4], losses, strict=True)
    ]
    for fit in (fit_law, hold_out):
        with pytest.raises(ValueError, match=said):
            fit(rungs)


def test_steep_draws_of_large_runs_end_nothing() -> None:
    """Runs of 1e24 FLOPs whose larger sizes are nearly alike: in some draws a scale A is beyond all numbers."""
    rng = np.random.default_rng(2)
    losses = zip([1e24, 3e24, 9e24, 27e24], [2.1, 2.004, 2.0, 2.0], strict=True)
    held = hold_out([Rung(size, by_seed(loss + 0.003 * rng.standard_normal(3))) for size, loss in losses], draws=200)
    steepest = max(held.fit.draws, key=lambda law: law.exponent)
    assert steepest.exponent * math.log(1e24) > 710  # A = exp(that) and more
    assert held.fit.scale.high == math.inf and held.fit.law.exponent in held.fit.exponent
    assert held.inside and held.interval.high - held.interval.low < 0.05


def test_three_sizes_leave_none_to_hold_out() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        hold_out(ladder(np.random.default_rng(0), seeds=3)[:3])
