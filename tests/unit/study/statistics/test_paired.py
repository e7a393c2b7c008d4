"""Comparisons with a baseline: planted effects come back, and no effect is claimed where there is none."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from moe_dist.study.statistics.paired import Verdict, compare, holm, p_of_zero, p_within, pair
from moe_dist.study.statistics.power import minimum_detectable
from tests.unit.study.statistics.planted import by_seed, planted

FAMILY = 12
CLAIMS = (Verdict.LARGER, Verdict.SMALLER)


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_planted_effects_are_covered(seeds: int) -> None:
    """200 draws: intervals of the named difference; and of a family all together."""
    rng, effects = np.random.default_rng(seeds), [0.02, 0.0, -0.05]
    covered = {"interval": 0, "bootstrap": 0, "together": 0}
    for _ in range(200):
        baseline, *points = planted(rng, [3.0, *(3.0 + effect for effect in effects)], seeds)
        found = compare(dict(zip("abc", points, strict=True)), baseline)
        assert found[0].mean == pytest.approx(0.02, abs=0.06)
        for name in ("interval", "bootstrap"):
            covered[name] += effects[0] in getattr(found[0], name)
        covered["together"] += all(effect in each.together for effect, each in zip(effects, found, strict=True))
    assert all(0.90 <= number / 200 <= 0.98 for number in covered.values()), covered


@pytest.mark.parametrize("family, seeds", [(1, 3), (1, 5), (FAMILY, 3), (FAMILY, 5)])
def test_no_effect_is_rarely_claimed(family: int, seeds: int) -> None:
    """The named question, and any of a family of 12: at most 7% of 200 draws, 400 of the question."""
    rng, false, number_of_draws = np.random.default_rng(family + seeds), 0, 400 if family == 1 else 200
    for _ in range(number_of_draws):
        baseline, *points = planted(rng, [3.0] * (family + 1), seeds)
        found = compare({f"{number}": each for number, each in enumerate(points)}, baseline)
        false += any(each.verdict in CLAIMS for each in found)
    assert 0.005 <= false / number_of_draws <= 0.07


def test_without_holm_a_family_would_claim() -> None:
    rng, false = np.random.default_rng(0), 0
    for _ in range(200):
        baseline, *points = planted(rng, [3.0] * (FAMILY + 1), 5)
        found = compare({f"{number}": each for number, each in enumerate(points)}, baseline)
        false += any(each.p <= 0.05 for each in found)
    assert false / 200 > 0.2


def test_effects_are_called_by_their_names() -> None:
    """Far above, far below, and well within the smallest difference that matters."""
    rng = np.random.default_rng(0)
    baseline, *points = planted(rng, [3.0, 3.2, 2.8, 3.001], seeds=5, own=0.003)
    found = compare(dict(zip("abc", points, strict=True)), baseline, matters=0.05)
    assert [each.verdict for each in found] == [Verdict.LARGER, Verdict.SMALLER, Verdict.EQUIVALENT]
    unsaid = compare(dict(zip("abc", points, strict=True)), baseline)[2]
    assert unsaid.verdict is Verdict.NOT_DISTINGUISHABLE and unsaid.p_equivalent is None
    assert unsaid.at_most == max(-unsaid.together.low, unsaid.together.high)


def test_a_difference_that_matters_is_rarely_called_equivalent() -> None:
    """True differences of exactly what matters: at most 7% of 400 draws; a tenth of it is called so in most."""
    rng, called = np.random.default_rng(0), {0.02: 0, 0.002: 0}
    for effect in called:
        for _ in range(400):
            baseline, point = planted(rng, [3.0, 3.0 + effect], seeds=5, own=0.004)
            called[effect] += compare({"a": point}, baseline, matters=0.02)[0].verdict is Verdict.EQUIVALENT
    assert called[0.02] / 400 <= 0.07 and called[0.002] / 400 > 0.8


def test_pairing_takes_the_noise_of_seeds_away() -> None:
    """Seeds differ by 0.1, the effect is 0.02: pairs show it, unpaired values could not."""
    baseline, point = planted(np.random.default_rng(1), [3.0, 3.02], seeds=5, own=0.003)
    assert compare({"a": point}, baseline)[0].verdict is Verdict.LARGER
    assert stats.ttest_ind(list(point.values()), list(baseline.values())).pvalue > 0.3


def test_numbers_are_those_of_scipy_and_statsmodels() -> None:
    rng = np.random.default_rng(3)
    baseline, *points = planted(rng, [3.0, 3.01, 3.02, 3.05], seeds=6)
    found = compare(dict(zip("abc", points, strict=True)), baseline, matters=0.03)
    values = [list(each.values()) for each in points]
    tests = [stats.ttest_rel(each, list(baseline.values())) for each in values]
    assert [each.p for each in found] == pytest.approx([each.pvalue for each in tests])
    adjusted = multipletests([each.pvalue for each in tests], method="holm")[1]
    assert [each.p_holm for each in found] == pytest.approx(list(adjusted))
    level = tests[1].confidence_interval(1 - 0.05 / 3)
    assert [found[1].together.low, found[1].together.high] == pytest.approx([level.low, level.high])
    differences = np.array(values) - list(baseline.values())
    pooled = differences.var(axis=1, ddof=1).mean() ** 0.5
    assert found[0].detectable == pytest.approx(minimum_detectable(pooled, 6, comparisons=3))
    lower = stats.ttest_1samp(differences[0], -0.03, alternative="greater").pvalue
    upper = stats.ttest_1samp(differences[0], 0.03, alternative="less").pvalue
    assert p_within(list(differences[0]), 0.03) == pytest.approx(max(lower, upper))


def test_holm_by_hand() -> None:
    """Sorted p times 4, 3, 2, 1, never falling: 0.04, 0.06, 0.06 instead of 0.044, 0.5; and against statsmodels."""
    assert holm({"a": 0.02, "b": 0.01, "c": 0.5, "d": 0.022}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06}
    )
    assert holm({}) == {}
    for p in np.random.default_rng(0).uniform(size=(5, 12)) ** 3:
        assert list(holm(dict(enumerate(p))).values()) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_missing_seeds_are_named() -> None:
    pairs = pair({0: 1.0, 1: 2.0, 3: 5.0}, {3: 1.0, 1: 1.5, 2: 9.0, 4: 9.0})
    assert pairs.differences == {1: 0.5, 3: 4.0}
    assert (pairs.only_point, pairs.only_baseline) == ((0,), (2, 4))


def test_fewer_than_three_pairs_make_no_claim_and_do_not_count_in_the_family() -> None:
    baseline = by_seed([1.0, 2.0, 3.0, 4.0])
    full = by_seed([1.5, 2.6, 3.4, 4.5])
    found = compare({"none": {9: 1.0}, "one": {0: 2.0}, "two": {0: 2.0, 1: 2.5}, "full": full}, baseline)
    assert [each.verdict for each in found[:3]] == [Verdict.TOO_FEW_SEEDS] * 3
    assert [each.mean for each in found[:3]] == [None, 1.0, 0.75]
    for each in found[:3]:
        assert {each.interval, each.bootstrap, each.together, each.p, each.p_holm, each.detectable} == {None}
        assert each.at_most is None
    assert found[3].p_holm == found[3].p and found[3].together == found[3].interval


def test_values_without_variance() -> None:
    """Equal to the baseline: nothing is claimed; another by the same amount for every seed: that much larger."""
    baseline = by_seed([1.0, 2.0, 3.0])
    same, above = compare({"same": dict(baseline), "above": by_seed([1.5, 2.5, 3.5])}, baseline, matters=0.1)
    assert (same.verdict, same.p, same.at_most, same.detectable) == (Verdict.EQUIVALENT, 1.0, 0.0, 0.0)
    assert (above.verdict, above.p, above.mean) == (Verdict.LARGER, 0.0, 0.5)
    assert compare({"same": dict(baseline)}, baseline)[0].verdict is Verdict.NOT_DISTINGUISHABLE
    assert p_of_zero([0.0, 0.0, 0.0]) == 1.0
    (tenth,) = compare({"tenth": by_seed([0.1, 0.1, 0.1])}, by_seed([0.0, 0.0, 0.0]), matters=0.1)
    assert (tenth.mean, tenth.p, tenth.p_equivalent, tenth.detectable) == (0.1, 0.0, 1.0, 0.0)  # as large as matters
    assert tenth.verdict is Verdict.LARGER


def test_what_cannot_be_is_refused() -> None:
    good = by_seed([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="factor 1, seed 1: nan is no measurement"):
        compare({"factor 1": by_seed([1.0, float("nan"), 3.0])}, good)
    with pytest.raises(ValueError, match="baseline, seed 0: inf"):
        compare({"a": good}, by_seed([float("inf"), 1.0]))
    with pytest.raises(ValueError, match="matters=0"):
        compare({"a": good}, good, matters=0)
    with pytest.raises(ValueError, match="alpha=5"):
        compare({"a": good}, good, alpha=5)
