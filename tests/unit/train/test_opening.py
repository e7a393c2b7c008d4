from typing import Any

import pytest
import torch

from moe_dist.config import validate
from moe_dist.parallel.mesh import Layout, mesh_without_processes
from moe_dist.plan.memory import memory
from moe_dist.train import opening
from tests.dist.helpers import tiny_config


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_refused_before_it_is_built_or_doubted(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """By what all ranks of this machine need together, for on CPU they share its memory."""
    config, mesh = tiny_config(), mesh_without_processes(Layout(2), 1)
    shape, plan = validate(config, 2), memory(config, validate(config, 2), Layout(2), device_type="cpu")
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": ranks - 1, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    said: list[str] = []

    def begin(available: int) -> None:
        monkeypatch.setattr(opening, "host_memory", lambda: available)
        opening.refuse_what_cannot_fit(config, shape, mesh, torch.device("cpu"), said.append)

    begin(10 * ranks * plan.total)
    assert said == []
    begin(ranks * plan.total - 1)
    (note,) = said
    assert note.startswith("note      ") and "set model.recompute to block" in note
    begin(ranks * plan.sure)
    with pytest.raises(ValueError, match="do not fit into") as refused:
        begin(ranks * plan.sure - 1)
    whose = "a rank" if ranks == 1 else "the 2 ranks of this machine"
    assert f"optimizer state on {whose}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "compete"),
    [
        ({}, True),
        ({"model__moe__capacity_factor": None}, False),
        ({"model__moe__capacity_factor": None, "model__moe__capacity_schedule": {2: 1.0}}, True),
        ({"model__moe__num_experts": 0}, False),
        ({"model__moe__num_experts": 0, "model__attention__kind": "switch"}, True),
    ],
)
def test_tokens_compete_where_experts_have_a_capacity(changes: dict[str, Any], compete: bool) -> None:
    config = tiny_config(**changes)
    (line,) = opening.step_lines(config, validate(tiny_config(), 1), 0)
    assert ("tokens that compete for capacity; steps 1 to " in line) == compete
    assert ("tokens; steps 1 to " in line) != compete


def test_a_run_that_is_done_says_how_to_train_longer() -> None:
    config = tiny_config(train__steps=120)
    line, note = opening.step_lines(config, validate(config, 1), 120)
    assert line.endswith("; all 120 steps are done")
    assert "nothing is left" in note and note.endswith("--resume --train.steps 240")
