"""A step whose gradients are not finite, or that is discarded, leaves nothing behind, under every engine."""

import math
from collections.abc import Callable

import pytest
import torch

from moe_dist.engine.base import STATE_KINDS
from moe_dist.parallel.mesh import create_mesh
from tests.dist.helpers import TinyRun, assert_same, logical, run_checks, tiny_config

ENGINES = {
    "native": {"parallel__ep": 2},
    "native-bf16": {"engine__precision": "bf16"},
    "zero0": {"engine__name": "deepspeed", "parallel__ep": 2},
    "zero1": {"engine__name": "deepspeed", "engine__zero_stage": 1, "parallel__ep": 2},
    "zero2": {"engine__name": "deepspeed", "engine__zero_stage": 2, "parallel__ep": 2},
    "zero2-bf16": {"engine__name": "deepspeed", "engine__zero_stage": 2, "engine__precision": "bf16"},
    "zero3": {"engine__name": "deepspeed", "engine__zero_stage": 3},
    "native-tp": {"parallel__tp": 2},
    "zero1-tp": {"engine__name": "deepspeed", "engine__zero_stage": 1, "parallel__tp": 2},
    "zero2-tp-bf16": {
        **{"engine__name": "deepspeed", "engine__zero_stage": 2, "engine__precision": "bf16"},
        "parallel__tp": 2,
    },
    "zero3-tp": {"engine__name": "deepspeed", "engine__zero_stage": 3, "parallel__tp": 2},
}


def tiny(name: str) -> TinyRun:
    """With a router that moves a bias at every step it learns of."""
    moe = {"model__moe__router": "sigmoid", "model__moe__bias_update_rate": 0.1, "train__accumulation": 2}
    config = tiny_config(**(moe | ENGINES[name]))
    return TinyRun(config, create_mesh(config.parallel.ep, config.parallel.tp))


def poisoned(run: TinyRun, where: str = "expert") -> None:
    """A step with one NaN, in the gradient of an expert on the last rank."""
    last = run.mesh.rank == run.mesh.layout.world - 1
    name, param = [(n, p) for n, p in run.engine.model.named_parameters() if where in n][-1]
    assert param.numel() or run.config.engine.zero_stage == 3, name

    def poison(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = math.nan
        return grad

    hook = param.register_hook(poison) if last else None
    run.forward_backward(2)
    if hook is not None:
        hook.remove()
    assert not math.isfinite(run.engine.update(run.config.optim.lr))


def poisoned_norm(run: TinyRun) -> None:
    """A NaN in the gradient of what every rank holds; under tp, only ranks with the last one's tp rank reduce it."""
    poisoned(run, "norm")


def discarded(run: TinyRun) -> None:
    run.forward_backward(2)
    run.engine.discard()


def check_nothing_is_left(name: str, leave_out: Callable[[TinyRun], None]) -> None:
    run = tiny(name)
    run.train(0, 2)
    before = {kind: logical(run.engine, kind) for kind in STATE_KINDS}
    leave_out(run)
    for kind in STATE_KINDS:
        assert_same(logical(run.engine, kind), before[kind])
    losses = run.train(3, 5)
    straight = tiny(name)
    straight.train(0, 2)
    assert straight.train(3, 5) == losses
    for kind in STATE_KINDS:
        assert_same(logical(run.engine, kind), logical(straight.engine, kind))
    moved = logical(run.engine, "weight")
    assert any(not torch.equal(moved[key], value) for key, value in before["weight"].items())


def check_every_engine(names: list[str]) -> None:
    for name in names:
        for leave_out in (poisoned, poisoned_norm, discarded):
            try:
                check_nothing_is_left(name, leave_out)
            except Exception as error:
                raise AssertionError(f"{name}, {leave_out.__name__}: {error}") from error


QUICK = ["native", "zero1", "zero3", "native-tp", "zero1-tp"]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in ENGINES if name not in QUICK], marks=pytest.mark.slow)]
)
def test_a_step_left_out_leaves_nothing_behind(names: list[str]) -> None:
    run_checks(2, [check_every_engine], names)
