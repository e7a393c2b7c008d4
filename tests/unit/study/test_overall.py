"""A difference over all settings together, against SciPy's paired test on means over settings."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.report.answer import answer
from moe_dist.study.report.overall import overall_table
from moe_dist.study.report.report import page_of
from tests.unit.study.synthetic import QUESTION, STUDY, plant, planted_losses, planted_study

SEEDS = [0, 1, 2, 3, 4]
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
    losses = {
        factor: np.mean(
            [
                [cell.by_seed("validation_loss")[seed] for seed in SEEDS]
                for cell in grid
                if cell.axes["model.moe.capacity_factor"] == factor
            ],
            axis=0,
        )
        for factor in (0.5, 1.0, None)
    }
    for row, factor in zip(table.rows, (0.5, 1.0), strict=True):
        expected = stats.ttest_rel(losses[factor], losses[None])
        interval = expected.confidence_interval(0.95)
        assert row[4:] == pytest.approx(
            [np.mean(losses[factor] - losses[None]), interval.low, interval.high, expected.pvalue], rel=1e-9
        )
    page = page_of(study)
    assert page is not None
    (section,) = (section for section in page.sections if section.title == "Over all settings")
    assert section.exploratory


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
