"""A difference over all settings together, against SciPy's tests of the same numbers."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.report.answer import answer
from moe_dist.study.report.overall import overall_table, wider_interval
from moe_dist.study.report.report import page_of
from tests.unit.study.synthetic import QUESTION, STUDY, plant, planted_losses, planted_study

TWO_AXES = STUDY.replace("axes:", "axes:\n  model.moe.num_experts: [4, 8, 16]") + QUESTION


def table_of(study):  # type: ignore[no-untyped-def]
    grid = cells(study, Ledger(study.ledger).latest())
    found = answer(study, grid).families
    return grid, overall_table((*found.named, *found.others), "validation_loss")


def test_a_value_in_three_settings(tmp_path: Path) -> None:
    study = planted_study(tmp_path, TWO_AXES)
    plant(study, planted_losses({0.5: 0.004, 1.0: 0.0, None: 0.0}, own=0.01))
    grid, table = table_of(study)
    assert [row[:4] for row in table.rows] == [["0.5", "dropless", 3, 5], ["1.0", "dropless", 3, 5]]
    of = {
        factor: np.array([cell.values("validation_loss") for cell in grid if list(cell.axes.values())[1] == factor])
        for factor in (0.5, 1.0, None)
    }
    for row, factor in zip(table.rows, (0.5, 1.0), strict=True):
        assert row[4] == pytest.approx(np.mean(of[factor] - of[None]), rel=1e-9)
        low, high = wider_by_scipy(of[factor] - of[None])
        assert row[5:] == pytest.approx([low, high], rel=1e-9)
    page = page_of(study)
    assert page is not None
    (section,) = (section for section in page.sections if section.title == "Over all settings")
    assert section.exploratory


def wider_by_scipy(difference_SN: np.ndarray) -> tuple[float, float]:
    """Of two settings and more: Welch's interval of a difference, where one side is minus the other settings' sum."""
    shared = stats.ttest_1samp(difference_SN.mean(0), 0.0).confidence_interval(0.95)
    error_S = difference_SN.var(1, ddof=1) / difference_SN.shape[1] / len(difference_SN) ** 2
    freedom = error_S.sum() ** 2 / np.sum(error_S**2 / (difference_SN.shape[1] - 1))
    within = stats.t(freedom, difference_SN.mean(), np.sqrt(error_S.sum())).interval(0.95)
    return max((tuple(shared), within), key=lambda ends: ends[1] - ends[0])  # type: ignore[no-any-return]


def test_welch_of_two_settings() -> None:
    """The mean of a and b is half the difference of a and -b, whose interval SciPy gives."""
    a, b = np.random.default_rng(0).normal([[0.1], [0.3]], [[0.5], [0.1]], (2, 6))
    b -= 0.2 * (a - a.mean())  # so that means over settings spread less
    expected = stats.ttest_ind(a, -b, equal_var=False).confidence_interval(0.95)
    found = wider_interval(np.stack([a, b]))
    shared = stats.ttest_1samp((a + b) / 2, 0.0).confidence_interval(0.95)
    assert found is not None and expected.high - expected.low > shared.high - shared.low
    assert (found.low, found.high) == pytest.approx((expected.low / 2, expected.high / 2), rel=1e-9)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_the_truth_is_covered(shared: float) -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(2000):
        drawn = 0.3 + rng.standard_normal((6, 5)) * rng.uniform(0.5, 1.5, (6, 1)) + shared * rng.standard_normal(5)
        interval = wider_interval(drawn)
        assert interval is not None
        covered += 0.3 in interval
    assert 0.94 < covered / 2000 < 0.995


def test_seeds_without_a_pair_somewhere_are_left_out_and_one_setting_is_none(tmp_path: Path) -> None:
    study = planted_study(tmp_path / "three", TWO_AXES)
    missing = study.points[0].name
    assert "capacity_factor=0.5" in missing and "seed=0" in missing
    plant(
        study,
        planted_losses({0.5: 0.1, 1.0: 0.0, None: 0.0}),
        change=lambda point: {"status": "failed"} if point.name == missing else {},
    )
    _, table = table_of(study)
    assert [row[2:4] for row in table.rows] == [[3, 4], [3, 5]]
    study = planted_study(tmp_path / "one")
    plant(study, planted_losses({0.5: 0.1, 1.0: 0.0, None: 0.0}))
    assert table_of(study)[1] is None
    assert wider_interval(np.ones((3, 2))) is None
    equal = wider_interval(np.full((3, 4), 0.5))
    assert equal is not None and (equal.low, equal.high) == (0.5, 0.5)
