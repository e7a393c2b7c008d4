"""What a report answers: planted truths on the whole way from the ledger to the sentence, and scipy's numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.design.grid import CAPACITY, Study
from moe_dist.study.ledger.cells import Cell, cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.report.answer import Answer, answer
from moe_dist.study.report.matches import compared, families
from moe_dist.study.statistics.paired import Verdict
from tests.unit.study.synthetic import QUESTION, STUDY, Loss, plant, planted_losses, planted_study, record_of

TEXTS = STUDY.replace("train.steps: 100", "train.steps: 100, task: classification, model.num_classes: 7")
DROPLESS = [2.03, 1.98, 2.01, 2.11, 2.06]
ADDED = {0.5: [0.101, 0.098, 0.107, 0.093, 0.096], 1.0: [0.004, -0.007, 0.003, 0.002, -0.005]}


def fixed(point: Any, rng: Any) -> float:
    factor = point.config.model.moe.capacity_factor
    return DROPLESS[point.seed] + (0.0 if factor is None else ADDED[factor][point.seed])


def answered(study: Study, loss: Loss = fixed, **how: Any) -> Answer:
    """From the ledger on disk."""
    plant(study, loss, **how)
    return answer(study, cells(study, Ledger(study.ledger).latest()))


def grid(study: Study, loss: Loss, seed: int) -> list[Cell]:
    """Without the disk, for many draws."""
    rng = np.random.default_rng(seed)
    return cells(study, {point.name: record_of(point, loss(point, rng)) for point in study.points})


def drawn(study: Study, loss: Loss, seed: int) -> Answer:
    return answer(study, grid(study, loss, seed))


def test_the_answer_is_two_sentences_with_scipys_numbers(tmp_path: Path) -> None:
    found = answered(planted_study(tmp_path))
    assert found.asked == (
        "Does validation loss at 0.5 and 1.0 differ from dropless by as much as 0.01, and which is the cheapest by "
        "time?"
    )
    half, one = found.comparisons
    tests = {factor: stats.ttest_1samp(added, 0.0) for factor, added in ADDED.items()}
    low, high = tests[0.5].confidence_interval(0.95)
    assert (half.interval.low, half.interval.high) == pytest.approx((low, high))  # type: ignore[union-attr]
    assert half.p_holm == pytest.approx(2 * tests[0.5].pvalue) and one.p == pytest.approx(tests[1.0].pvalue)
    equal = max(
        stats.ttest_1samp(ADDED[1.0], 0.01, alternative="less").pvalue,
        stats.ttest_1samp(ADDED[1.0], -0.01, alternative="greater").pvalue,
    )
    verdicts, advice = found.sentences
    assert verdicts == (
        f"0.5 is worse than dropless by {np.mean(ADDED[0.5]):.3g} ({low:.3g} to {high:.3g}); 1.0 differs from "
        f"dropless by less than the 0.01 that matters ({np.mean(ADDED[1.0]):+.3g}, p = {2 * equal:.2g})."
    )
    assert advice == (
        "By time take 1.0: the cheapest whose validation loss is not worse than the best by more than 0.01, as it is "
        "in 100% of bootstrap draws of 5 seeds."
    )
    spread = np.sqrt(np.mean([np.var(np.add(DROPLESS, added), ddof=1) for added in ([0] * 5, *ADDED.values())]))
    assert found.floor is not None and found.floor.deviation == pytest.approx(spread)


def test_what_cannot_be_told_has_a_bound(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY + QUESTION.replace("smallest_difference: 0.01", "spread: 0.01"))
    found = answered(study)
    high = -stats.ttest_1samp(ADDED[1.0], 0.0).confidence_interval(0.975).low
    assert found.sentences[0].endswith(
        f"; 1.0 is not distinguishable from dropless at 5 seeds: smaller than {high:.3g}."
    )
    assert found.sentences[1] == "Nothing is recommended: the question states no `smallest_difference`."
    assert [order.words for order in found.orders] == [
        "Validation loss is in the order {1.0, dropless} < 0.5; within 1.0 and dropless no ranking is given, since not "
        "all of them can be told apart."
    ]


def test_of_accuracy_more_is_better(tmp_path: Path) -> None:
    study = planted_study(tmp_path, TEXTS + QUESTION + "  metric: validation_accuracy\n")
    change = {0.5: 0.05, 1.0: 0.0, None: 0.0}
    found = answered(
        study, change=lambda p: {"validation_accuracy": 0.5 + change[p.axes[CAPACITY]] + 0.001 * (p.index * 7 % 5)}
    )
    assert found.sentences[0].startswith("0.5 is better than dropless by 0.05")
    assert found.sentences[1].startswith("By time take 0.5:")
    assert found.advice[0].reasons.startswith("0.5 has the highest validation accuracy of 3 points")


def test_a_claim_has_its_own_interval_clear_of_zero(tmp_path: Path) -> None:
    """Of two, 1.0 is told by Holm at 0.05, though the interval that holds for both at once has zero in it."""
    added = {0.5: [0.101, 0.098, 0.107, 0.093, 0.096], 1.0: [0.001, 0.006, 0.002, 0.009, 0.004]}

    def loss(point: Any, rng: Any) -> float:
        factor = point.config.model.moe.capacity_factor
        return DROPLESS[point.seed] + (0.0 if factor is None else added[factor][point.seed])

    test = stats.ttest_1samp(added[1.0], 0.0)
    low, high = test.confidence_interval(0.95)
    assert low > 0 > test.confidence_interval(0.975).low
    study = planted_study(tmp_path, STUDY + QUESTION.replace("smallest_difference: 0.01", "spread: 0.01"))
    said = answered(study, loss).sentences[0]
    assert said.endswith(f"; 1.0 is worse than dropless by {np.mean(added[1.0]):.3g} ({low:.3g} to {high:.3g}).")


def test_a_metric_that_no_run_has_is_named(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY + QUESTION + "  metric: validation_bits_per_token\n")
    assert answered(study).sentences == ("No finished point has a validation bits/token, so it has no answer yet.",)


def test_times_that_are_equal_do_not_decide(tmp_path: Path) -> None:
    """0.5 is faster by 1% and worse by less than matters: 1.0 is taken, since they cost the same."""
    seconds = {0.5: 0.099, 1.0: 0.1, None: 0.12}
    added = {0.5: [0.006, 0.005, 0.007, 0.005, 0.006], 1.0: [0.001, 0.0, 0.002, 0.0, 0.001]}

    def loss(point: Any, rng: Any) -> float:
        factor = point.config.model.moe.capacity_factor
        return DROPLESS[point.seed] + (0.0 if factor is None else added[factor][point.seed])

    found = answered(planted_study(tmp_path), loss, change=lambda p: {"step_seconds": seconds[p.axes[CAPACITY]]})
    assert found.sentences[1].startswith("By time take 1.0:")
    assert "0.5 costs the same, but 1.0 has the lower validation loss" in found.advice[0].reasons


def test_fewer_than_three_seeds_claim_nothing(tmp_path: Path) -> None:
    found = answered(planted_study(tmp_path, STUDY.replace("[0, 1, 2, 3, 4]", "[0, 1]") + QUESTION))
    assert found.sentences[0] == (
        "0.5 has 2 pairs of seeds, and an interval needs 3: its mean difference to dropless, +0.0995, has none; 1.0 "
        "has 2 pairs of seeds, and an interval needs 3: its mean difference to dropless, -0.0015, has none."
    )
    assert found.sentences[1].startswith("Nothing is recommended: 2 seeds are common to all points")
    assert all(each.interval is None and each.p_holm is None for each in found.comparisons)


def test_only_what_is_named_is_claimed(tmp_path: Path) -> None:
    question = QUESTION + "  compare: {model.moe.capacity_factor: [1.0]}\n"
    found = answered(planted_study(tmp_path / "named", STUDY + question))
    assert [each.name for each in found.comparisons] == ["capacity_factor 1.0"]
    assert [match.short for match in found.families.others] == ["0.5"]
    alone = answered(planted_study(tmp_path / "none", STUDY))
    assert alone.comparisons == () and alone.asked == "" and len(alone.families.others) == 2
    assert alone.sentences[0].startswith("No question was stated") and "`question:`" in alone.sentences[1]


def test_a_recommendation_without_its_cost_says_so(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY + QUESTION.replace("time", "bytes"))
    assert answered(study).sentences[1] == "Nothing is recommended: the ledger has no bytes of 0.5, 1.0 and dropless."
    costs = {0.5: 1.0, 1.0: 2.0, None: 3.0}
    found = answered(study, change=lambda p: {"dispatch_bytes": costs[p.axes[CAPACITY]]})
    assert found.sentences[1].startswith("By bytes take 1.0:")


SETTINGS = """
name: planted
base: base.yaml
overrides: {train.steps: 100}
axes:
  model.moe.top_k: [1, 2]
  model.moe.drop_policy: [position, score]
  model.moe.capacity_factor: [0.5, 1.0, 1.5, null]
seeds: [0, 1, 2, 3, 4]
"""


def test_a_family_of_twelve_over_four_settings_is_rarely_claimed_falsely(tmp_path: Path) -> None:
    """Any claim in at most 7% of 200 draws; without Holm over all of them it would be in many more."""
    study = planted_study(tmp_path, SETTINGS + QUESTION.replace("smallest_difference: 0.01", "spread: 0.01"))
    loss = planted_losses(dict.fromkeys((0.5, 1.0, 1.5, None), 0.0))
    assert drawn(study, loss, 0).sentences[0].startswith("Of 12 comparisons with dropless, 12 are not ")
    claimed = alone = 0
    for seed in range(200):
        found = compared(families(study, grid(study, loss, seed), study.file.question).named, "validation_loss")
        assert len(found) == 12
        claimed += any(each.verdict is not Verdict.NOT_DISTINGUISHABLE for each in found)
        alone += any(each.p is not None and each.p <= 0.05 for each in found)
    assert claimed <= 0.07 * 200 and alone > 0.25 * 200


def test_planted_effects_come_back_from_the_ledger(tmp_path: Path) -> None:
    """200 draws: the named interval covers the effect in 90 to 98%, and the recommendation is that of the truth."""
    study = planted_study(tmp_path)
    loss = planted_losses({0.5: 0.03, 1.0: 0.001, None: 0.0})
    found = [drawn(study, loss, seed) for seed in range(200)]
    for number, effect in enumerate((0.03, 0.001)):
        for kind in ("interval", "bootstrap"):
            covered = np.mean([effect in getattr(one.comparisons[number], kind) for one in found])
            assert 0.90 <= covered <= 0.98, (effect, kind, covered)
    assert np.mean([one.sentences[0].startswith("0.5 is worse than dropless by 0.0") for one in found]) >= 0.95
    assert np.mean([one.sentences[1].startswith("By time take 1.0:") for one in found]) >= 0.95


def test_settings_are_told_apart_and_missing_ones_named(tmp_path: Path) -> None:
    text = SETTINGS.replace("[position, score]", "[position]").replace("[0.5, 1.0, 1.5, null]", "[1.0, null]")
    study = planted_study(tmp_path, text + QUESTION)
    loss = planted_losses({1.0: 0.03, None: 0.0})
    found = answered(study, loss)
    assert found.sentences[0].count("1.0 (top_k 1) is worse than dropless by 0.0298 (") == 1
    assert found.sentences[1].startswith("By time take dropless at top_k 1 (100%) and dropless at top_k 2 (100%)")
    latest = {
        name: each for name, each in Ledger(study.ledger).latest().items() if each["axes"]["model.moe.top_k"] == 1
    }
    half = answer(study, cells(study, latest))
    assert "none is recommended at top_k 2" in half.sentences[1]
    assert answer(study, cells(study, {})).sentences == (
        "No point that the question names has finished, so it has no answer yet.",
    )


def test_what_few_draws_agree_on_is_not_recommended(tmp_path: Path) -> None:
    """0.5 is worse by 0.08 with so much noise that nothing is told apart: cheap, and no advice."""
    noise = {0.5: [0.15, 0.02, 0.07], 1.0: [0.01, 0.09, 0.07]}

    def loss(point: Any, rng: Any) -> float:
        factor = point.config.model.moe.capacity_factor
        return 3.0 + (0.0 if factor is None else noise[factor][point.seed])

    text = STUDY.replace("[0, 1, 2, 3, 4]", "[0, 1, 2]")
    seconds = {0.5: 0.08, 1.0: 0.1, None: 0.12}
    found = answered(
        planted_study(tmp_path, text + QUESTION), loss, change=lambda p: {"step_seconds": seconds[p.axes[CAPACITY]]}
    )
    assert "not distinguishable" in found.sentences[0] and found.advice[0].taken is None
    assert found.sentences[1].startswith(
        "By time nothing cheaper than the best is recommended: 0.5 is the cheapest that 3 seeds do not tell to be "
        "worse by more than 0.01, but it is the cheapest within 0.01 of the draw's best in only "
    )
    assert found.sentences[1].endswith("% of bootstrap draws; 3 seeds show it only of the best, dropless.")


def test_a_best_that_few_draws_take_is_not_recommended(tmp_path: Path) -> None:
    """Dropless is best, and cheapest, but 1.0 comes so near that most draws take another."""
    noise = {0.5: [-0.3, 0.31, 0.02], 1.0: [0.31, -0.3, 0.02]}

    def loss(point: Any, rng: Any) -> float:
        factor = point.config.model.moe.capacity_factor
        return 3.0 + (0.0 if factor is None else noise[factor][point.seed])

    text = STUDY.replace("[0, 1, 2, 3, 4]", "[0, 1, 2]")
    seconds = {0.5: 0.12, 1.0: 0.12, None: 0.08}
    found = answered(
        planted_study(tmp_path, text + QUESTION), loss, change=lambda p: {"step_seconds": seconds[p.axes[CAPACITY]]}
    )
    one = found.advice[0].recommendation
    assert one is not None and one.name == one.best == "dropless" and one.chosen["dropless"] < 0.5
    assert found.sentences[1] == (
        "By time nothing is recommended: dropless has the best validation loss, but it is the cheapest within 0.01 of "
        f"the draw's best in only {one.chosen['dropless']:.0%} of bootstrap draws."
    )


def test_many_settings_without_advice_are_counted(tmp_path: Path) -> None:
    text = SETTINGS.replace("[1, 2]", "[1, 2, 3, 4]").replace("[0.5, 1.0, 1.5, null]", "[1.0, null]")
    study = planted_study(tmp_path, text + QUESTION)
    plant(study, planted_losses({1.0: 0.03, None: 0.0}))
    latest = {
        name: each
        for name, each in Ledger(study.ledger).latest().items()
        if each["axes"]["model.moe.top_k"] == 1 and each["axes"]["model.moe.drop_policy"] == "score"
    }
    said = answer(study, cells(study, latest)).sentences[1]
    assert said.count("drop_policy") == 7 and said.endswith(" and 1 more.")  # one is advised, six of seven are named
