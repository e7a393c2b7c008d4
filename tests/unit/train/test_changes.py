import json
from dataclasses import asdict, replace
from typing import Any

from moe_dist.config import Config
from moe_dist.config.schema import EngineConfig, OptimConfig, RunConfig, TrainConfig
from moe_dist.train.changes import changes

OPTIM = OptimConfig(lr=4e-3, min_lr_ratio=0.1, schedule="linear", warmup_steps=0)
BEFORE = Config(optim=OPTIM, train=TrainConfig(steps=500))


def told(config: Config, step: int = 500) -> list[str]:
    stored: dict[str, Any] = json.loads(json.dumps(asdict(BEFORE)))  # as a manifest gives it back
    return list(changes(stored, config, step))


def test_more_steps_lift_the_learning_rate_and_it_is_said() -> None:
    """Linear to a tenth: 4.0e-4 in the last of 500 steps; in step 501 of 1000, 4e-3 * (1 - 0.9 * 501 / 1000)."""
    assert told(replace(BEFORE, train=TrainConfig(steps=1000))) == [
        "changed   train.steps=1000, was 500: another schedule of the learning rate",
        "changed   the learning rate goes from 4.0e-04 in step 500 to 2.2e-03 in step 501",
    ]


def test_each_change_that_matters_has_a_line() -> None:
    optim = replace(OPTIM, weight_decay=0.0, beta2=0.99)
    engine = EngineConfig(precision="bf16", grad_clip=0.5)
    lines = told(replace(BEFORE, optim=optim, engine=engine), step=100)
    assert lines == [
        "changed   engine.precision=bf16, was fp32: masters and moments stay fp32; "
        "what is computed from them is rounded otherwise",
        f"changed   engine.grad_clip=0.5, was {BEFORE.engine.grad_clip}: gradients are clipped at another norm",
        "changed   optim.beta2=0.99, was 0.95: used from here on; the moments go on as they are",
        "changed   optim.weight_decay=0.0, was 0.1: used from here on; the moments go on as they are",
    ]


def test_nothing_changed_nothing_said() -> None:
    assert told(BEFORE) == []
    assert told(replace(BEFORE, run=RunConfig(name="other", log_every=3))) == []
    assert list(changes({}, BEFORE, 3)) == [], "a checkpoint that holds no configuration"
