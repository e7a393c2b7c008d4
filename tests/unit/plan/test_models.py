"""The published models of configs/models/: they are what they are called, and a thousand ranks of them agree."""

from pathlib import Path

import pytest

from moe_dist.config import validate
from moe_dist.config.load import load_config
from moe_dist.models.parameters import parameter_counts
from moe_dist.plan.dry_run import dry_run, text

MODELS = Path(__file__).parents[3] / "configs" / "models"
RANKS = 1024
# Parameters and those that a token meets, as published; of Switch-C the total alone.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "qwen3-235b-a22b": (235e9, 22e9),
    "switch-c-2048": (1.571e12, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    config = load_config(MODELS / f"{name}.yaml")
    validate(config, RANKS)
    counts, (total, active) = parameter_counts(config.model), PUBLISHED[name]
    assert counts.total == pytest.approx(total, rel=5e-3)
    assert active is None or counts.active == pytest.approx(active, rel=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_thousand_ranks_agree_with_one_another_and_with_the_plan(name: str) -> None:
    found = dry_run(load_config(MODELS / f"{name}.yaml"), RANKS, ranks_per_node=8)
    assert found.problems == [], text(found)
    assert all(run.differences == {} for run in found.ranks), text(found)
