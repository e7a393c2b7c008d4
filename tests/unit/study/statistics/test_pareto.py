"""The front with its noise, and the recommended point."""

import math

import numpy as np
import pytest

from moe_dist.study.statistics.pareto import Candidate, Standing, pareto, recommend
from tests.unit.study.statistics.planted import by_seed, planted


def candidates(
    means: dict[str, tuple[float, float]], seed: int = 0, seeds: int = 5, own: float = 0.002
) -> dict[str, Candidate]:
    """means: (cost, loss) by name."""
    losses = planted(np.random.default_rng(seed), [loss for _, loss in means.values()], seeds, own)
    return {name: Candidate(cost, each) for (name, (cost, _)), each in zip(means.items(), losses, strict=True)}


def test_standings() -> None:
    """b beats c, which costs more; d is as good as b for more; e is the best and the dearest."""
    means = {"a": (1, 3.5), "b": (2, 3.0), "c": (3, 3.2), "d": (4, 3.0), "e": (5, 2.5)}
    points = candidates(means, seed=1)
    found = {place.name: place for place in pareto(points)}
    assert [found[name].standing for name in "abe"] == [Standing.FRONT] * 3
    assert (found["c"].standing, found["c"].against) == (Standing.DOMINATED, ("b",))
    assert (found["d"].standing, found["d"].against) == (Standing.INSIDE_NOISE, ("b",))
    assert found["b"].loss == pytest.approx(np.mean(list(points["b"].losses.values())))


def test_equal_points_are_never_called_dominated() -> None:
    """At most 7% of 200 draws call any of four equal points dominated."""
    points = {f"{cost}": (cost, 3.0) for cost in (1.0, 2.0, 3.0, 4.0)}
    wrong = sum(any(p.standing is Standing.DOMINATED for p in pareto(candidates(points, seed))) for seed in range(200))
    assert wrong / 200 <= 0.07


def test_costs_that_are_nearly_equal() -> None:
    points = candidates({"a": (1.00, 3.2), "b": (1.01, 3.0)})
    assert [place.standing for place in pareto(points)] == [Standing.FRONT, Standing.FRONT]
    assert [place.standing for place in pareto(points, same_cost=0.02)] == [Standing.DOMINATED, Standing.FRONT]


def test_the_cheapest_that_is_not_worse_is_recommended() -> None:
    points = candidates({"0.5": (1, 3.1), "1.0": (2, 3.004), "1.25": (3, 3.0), "dropless": (4, 3.0)})
    found = recommend(points, matters=0.02)
    assert found.name == found.shown == "1.0" and found.best in ("1.25", "dropless")
    assert found.chosen["1.0"] > 0.99 and sum(found.chosen.values()) == pytest.approx(1)
    assert found.reasons[0].startswith(f"0.5 is cheaper, and worse than {found.best} by 0.")
    assert "in 100% of bootstrap draws" in found.reasons[-1] and found.seeds == (0, 1, 2, 3, 4)


def test_planted_truth_is_recommended() -> None:
    """0.5 is worse by 5 times what matters, 1.0 by a fifth: 1.0 in at least 90% of 200 draws."""
    means = {"0.5": (1.0, 3.05), "1.0": (2.0, 3.002), "dropless": (4.0, 3.0)}
    names = [recommend(candidates(means, seed), matters=0.01).name for seed in range(200)]
    assert names.count("1.0") / 200 >= 0.9


def test_of_equally_cheap_points_each_draw_takes_its_best() -> None:
    """By hand: a is lower on three of four seeds by 1 and higher on one by 3, a mean of 0. Draws favour a where
    the fourth seed is not among them, and neither where it is there once."""
    points = {"a": Candidate(1.0, by_seed([0.0, 0.0, 0.0, 3.0])), "b": Candidate(1.0, by_seed([1.0, 1.0, 1.0, 0.0]))}
    found = recommend(points, matters=100.0)
    fourth = [math.comb(4, times) * 0.25**times * 0.75 ** (4 - times) for times in range(5)]
    assert fourth[0] - 1e-9 <= found.chosen["a"] <= fourth[0] + fourth[1] + 1e-9
    assert found.chosen["b"] == pytest.approx(1 - found.chosen["a"])
    dear = points | {"b": Candidate(1.5, points["b"].losses)}
    assert recommend(dear, matters=100.0).chosen == {"a": 1.0, "b": 0.0}


def test_doubt_is_told() -> None:
    """A cheap point at just what matters, with much noise: chosen in some draws, and the shown point is another."""
    points = candidates({"1.0": (1.0, 3.02), "dropless": (2.0, 3.0)}, own=0.02, seed=3)
    found = recommend(points, matters=0.02)
    assert 0.02 < found.chosen["1.0"] < 0.98
    assert found.shown != found.name or found.chosen[found.name] > 0.5
    assert any("do not show" in reason for reason in found.reasons) == (found.shown != found.name)


def test_bootstrap_shares_by_hand() -> None:
    """Differences 0, 0 and 3 against limit 2.1: the mean 1 moves to 1 + (mean* - 1) sqrt(3 / 2). mean* is 0, 1, 2, 3
    with probabilities 8, 12, 6, 1 of 27: 1 + sqrt(3 / 2) is above 2.1, so 20 / 27."""
    cheap, dear = by_seed([5.0, 5.0, 8.0]), by_seed([5.0, 5.0, 5.0])
    found = recommend({"dear": Candidate(2, dear), "cheap": Candidate(1, cheap)}, matters=2.1)
    assert found.chosen["cheap"] == pytest.approx(20 / 27)


def test_of_equal_costs_the_lower_loss_is_taken() -> None:
    """Times 1.00 and 1.01 differ by what a measurement does, and cost no reason to take the worse of the two."""
    points = {"a": Candidate(1.00, by_seed([3.004, 3.106, 3.205])), "b": Candidate(1.01, by_seed([3.0, 3.1, 3.2]))}
    points["c"] = Candidate(1.5, by_seed([3.001, 3.1, 3.202]))
    assert recommend(points, matters=0.01).name == "a"
    found = recommend(points, matters=0.01, same_cost=0.02)
    assert found.name == found.best == "b" and found.chosen == {"a": 0.0, "b": pytest.approx(1), "c": 0.0}
    assert "a costs the same, but b has the lower loss" in found.reasons
    assert not any("the same" in reason for reason in recommend(points, matters=0.01, same_cost=0.005).reasons)
    with pytest.raises(ValueError, match="same_cost=-1"):
        recommend(points, matters=0.01, same_cost=-1)


def test_reasons_are_of_the_metric_and_its_direction() -> None:
    """Accuracies, negated: a has 0.002 less than b, which costs twice as much."""
    points = {"a": Candidate(1, by_seed([-0.5, -0.61, -0.7])), "b": Candidate(2, by_seed([-0.502, -0.613, -0.701]))}
    found = recommend(points, matters=0.01, metric="validation accuracy", sign=-1.0)
    assert found.name == "a" and found.reasons[0].startswith(
        "a costs 0.5 times what b does, whose validation accuracy is highest, and its own differs by -0.002, p = "
    )
    alone = recommend({"b": points["b"]}, matters=0.01, metric="validation accuracy", sign=-1.0)
    assert alone.reasons[0].startswith("b has the highest validation accuracy of 1 points")


def test_few_and_missing_seeds() -> None:
    points = candidates({"a": (1, 3.0), "b": (2, 3.0)}, seeds=2)
    none = recommend(points, matters=0.01)
    assert (none.name, none.best, none.shown, none.chosen) == (None, None, None, {})
    assert none.reasons == ("2 seeds are common to all points, and a recommendation needs 3",)
    points = candidates({"a": (1, 3.0), "b": (2, 3.0)}, seeds=5)
    points["a"].losses.pop(3)  # type: ignore[attr-defined]
    assert recommend(points, matters=0.01).left_seeds == (3,)
    alone = recommend({"a": points["a"]}, matters=0.01)
    assert alone.name == alone.best == alone.shown == "a" and alone.chosen == {"a": 1.0}


def test_what_cannot_be_is_refused() -> None:
    good = {"a": Candidate(1.0, by_seed([1.0, 2.0, 3.0]))}
    with pytest.raises(ValueError, match="no point"):
        recommend({}, matters=0.1)
    with pytest.raises(ValueError, match="matters=0"):
        recommend(good, matters=0)
    with pytest.raises(ValueError, match="b: a cost of nan"):
        pareto(good | {"b": Candidate(float("nan"), good["a"].losses)})
    with pytest.raises(ValueError, match="b, seed 0: inf"):
        recommend(good | {"b": Candidate(1.0, {0: float("inf")})}, matters=0.1)
    with pytest.raises(ValueError, match="b has no loss"):
        pareto(good | {"b": Candidate(1.0, {})})
    with pytest.raises(ValueError, match="same_cost=2"):
        pareto(good, same_cost=2)
