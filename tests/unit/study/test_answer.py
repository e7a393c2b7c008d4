"""What a report says of its seeds: numbers against scipy's and sums by hand."""

from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.answer import against_dropless, dropped_by_chance
from moe_dist.study.cells import Cell
from moe_dist.study.grid import CAPACITY
from tests.dist.helpers import tiny_config
from tests.unit.study.helpers import STUDY, toy_study

DROPLESS = {0: 2.03, 1: 1.98, 2: 2.01, 3: 2.11}
ADDED = {0.5: [0.101, 0.098, 0.107, 0.093], 1.0: [0.004, -0.011, 0.006, 0.002]}


def cell(axes: dict[str, Any], values: dict[int, float]) -> Cell:
    return Cell(axes, [{"seed": seed, "validation_loss": value} for seed, value in values.items()])


def the_grid(**others: Any) -> list[Cell]:
    capped = [
        cell(
            others | {CAPACITY: factor},
            {seed: DROPLESS[seed] + each for seed, each in zip(DROPLESS, added, strict=True)},
        )
        for factor, added in ADDED.items()
    ]
    return [*capped, cell(others | {CAPACITY: None}, DROPLESS)]


def rows_of(lines: list[str]) -> list[list[str]]:
    table = [line for line in lines if line.startswith("|")]
    return [[part.strip() for part in line.split("|")[1:-1]] for line in table[2:]]


def test_differences_are_those_of_scipy(tmp_path: Path) -> None:
    lines = against_dropless(toy_study(tmp_path), the_grid())
    half, one = rows_of(lines)
    tests = {factor: stats.ttest_1samp(added, 0.0) for factor, added in ADDED.items()}
    low, high = tests[0.5].confidence_interval(0.95)
    assert half[:4] == [
        "capacity_factor 0.5",
        f"{np.mean(ADDED[0.5]):+.4f}",
        f"{low:+.4f} to {high:+.4f}",
        f"{2 * tests[0.5].pvalue:.3f}",  # the smaller of two
    ]
    assert half[5].startswith("larger at 4 seeds, by +0.0998")
    assert one[3] == f"{tests[1.0].pvalue:.3f}" and one[5].startswith(
        "not distinguishable at 4 seeds: smaller than 0.0"
    )
    spread = np.sqrt(np.mean([np.var(list(each.by_seed("validation_loss").values()), ddof=1) for each in the_grid()]))
    assert f"Seeds of one point spread by {spread:.4f}." in lines[-1] and "its 0.95 t interval" in lines[-1]


def test_two_baselines_share_what_may_be_claimed_falsely(tmp_path: Path) -> None:
    axes = "axes:\n  model.moe.top_k: [1, 2]"
    study = toy_study(tmp_path, STUDY.replace("axes:", axes))
    lines = against_dropless(study, [*the_grid(**{"model.moe.top_k": 1}), *the_grid(**{"model.moe.top_k": 2})])
    rows = rows_of(lines)
    assert [row[0] for row in rows][:2] == ["top_k 1, capacity_factor 0.5", "top_k 1, capacity_factor 1.0"]
    low, high = stats.ttest_1samp(ADDED[0.5], 0.0).confidence_interval(0.975)
    assert rows[0][2] == rows[2][2] == f"{low:+.4f} to {high:+.4f}" and "its 0.975 t interval" in lines[-1]


def test_seeds_without_their_pair_are_named_and_few_seeds_claim_nothing(tmp_path: Path) -> None:
    study, grid = (
        toy_study(tmp_path),
        [cell({CAPACITY: 0.5}, {0: 2.5, 1: 2.6, 7: 2.4}), cell({CAPACITY: None}, DROPLESS)],
    )
    (row,) = rows_of(against_dropless(study, grid))
    assert row[2:5] == ["–", "–", "–"]
    assert row[5] == "too few seeds: 2, and an interval needs 3; seeds 7 without its pair; seeds 2, 3 missing"
    assert against_dropless(study, grid[:1]) == against_dropless(study, [cell({CAPACITY: 0.5}, {})]) == []


@pytest.mark.parametrize("factor, capacity", [(1.0, 4), (0.5, 2), (1.5, 6)])
def test_chance_is_the_tail_of_a_coin(factor: float, capacity: int) -> None:
    """8 tokens, each to one of two experts."""
    small: dict[str, Any] = dict(
        train__seq_len=4, train__global_batch=2, model__moe__num_experts=2, model__moe__top_k=1
    )
    over = sum(comb(8, load) / 2**8 * max(0, load - capacity) for load in range(9))
    config = tiny_config(**small, model__moe__capacity_factor=factor)
    assert dropped_by_chance(config, 1) == pytest.approx(2 * over / 8, abs=1e-12)
    # On two ranks four tokens each have limits of their own.
    local = tiny_config(**small, model__moe__capacity_factor=factor, model__moe__capacity_scope="local")
    over = sum(comb(4, load) / 2**4 * max(0, load - capacity // 2) for load in range(5))
    assert dropped_by_chance(local, 2) == pytest.approx(2 * over / 4, abs=1e-12)
    assert dropped_by_chance(config, 2) == dropped_by_chance(config, 1)


def test_where_no_theory_is() -> None:
    assert dropped_by_chance(tiny_config(model__moe__capacity_factor=None), 1) == 0
    for options in (
        dict(model__moe__overflow="reroute"),
        dict(model__moe__router="expert_choice"),
        dict(model__moe__capacity_factor=[1.0, 2.0]),
        dict(model__moe__capacity_schedule={3: 1.0}),
        dict(model__moe__num_experts=0),
    ):
        assert dropped_by_chance(tiny_config(**options), 1) is None, options
