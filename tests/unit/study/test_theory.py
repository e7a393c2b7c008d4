"""The drops of chance alone, by a point's configuration."""

from math import comb
from typing import Any

import pytest

from moe_dist.study.report.theory import dropped_by_chance
from tests.dist.helpers import tiny_config


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
