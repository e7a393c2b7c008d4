"""Planned memory against what ranks hold: states to the byte, the fullest moment of a step within a twentieth."""

from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor

from moe_dist.engine.native import NativeEngine
from moe_dist.parallel.mesh import create_mesh
from moe_dist.plan import states
from moe_dist.plan.held import Held
from moe_dist.plan.live_memory import LiveMemory
from moe_dist.plan.memory import memory
from tests.dist.helpers import TinyRun, rows_that_came, run_checks, tiny_config

# Large enough that activations count, with the attention that TinyRun's `auto` stands for.
MODEL: dict[str, Any] = {
    "model__d_model": 64,
    "model__num_heads": 4,
    "model__num_layers": 3,
    "model__attention": {"backend": "flash"},
    "model__moe": {"num_experts": 8, "d_ff": 128, "capacity_factor": None},
    "train__seq_len": 128,
    "engine__bucket_mib": 0.6,  # the usual one has room for many such models
}
ZERO = {"engine__name": "deepspeed"}
LAYOUTS: list[dict[str, Any]] = [
    {"parallel__ep": 2, "engine__precision": "bf16", "train__accumulation": 2},
    {"parallel__tp": 2, "parallel__ep": 2, "model__recompute": "block"},
    ZERO | {"engine__zero_stage": 1, "parallel__ep": 2},
    ZERO | {"engine__zero_stage": 2, "engine__precision": "bf16", "parallel__ep": 2},
    ZERO | {"engine__zero_stage": 2, "parallel__tp": 2, "model__recompute": "block"},
    ZERO | {"engine__zero_stage": 3, "parallel__ep": 2},
]
MORE: list[dict[str, Any]] = [
    {},
    {"parallel__tp": 2, "parallel__sequence_parallel": True},
    ZERO | {"engine__zero_stage": 0, "parallel__ep": 2},
    ZERO | {"engine__zero_stage": 1, "engine__precision": "bf16", "model__recompute": "block"},
    ZERO | {"engine__zero_stage": 3, "engine__precision": "bf16", "model__recompute": "block"},
]


def check_plans_are_what_ranks_measure(layouts: list[dict[str, Any]]) -> None:
    wrong = [said for layout in layouts for said in compared(MODEL | layout)]
    assert not wrong, "\n".join(wrong)


def compared(changes: dict[str, Any]) -> list[str]:
    """What is wrong with the plan of this rank, in words with all numbers."""
    config = tiny_config(**changes)
    parallel = config.parallel
    with LiveMemory() as live:
        run = TinyRun(config, create_mesh(parallel.ep, parallel.tp, parallel.etp))
        run.train(0, 2)  # moments are there, and ZeRO-3 knows in which order weights are used
        live.forget_peak()
        came = rows_that_came(run, run.forward_backward(2)[1])
        held = held_bytes(run.engine)
        run.engine.update(1e-3)
        layout, rank = run.mesh.layout, run.mesh.rank
        plan = memory(config, run.shape, layout, rank, device_type="cpu", came=came)
        most = memory(config, run.shape, layout, rank, device_type="cpu").total
        exact = states.states(config, layout, Held.of(config, layout, rank), rank, device_type="cpu")
    planned = {"parameters": exact.parameters, "gradients": exact.gradients, "optimizer": exact.optimizer}
    wrong = [] if held == planned else [f"held {held}, planned {planned}"]
    if abs(plan.total / live.peak - 1) > 0.05:
        wrong.append(f"at most {live.peak}, planned {plan.total} ({plan.total / live.peak - 1:+.3f})")
    if live.peak > 1.02 * most:
        wrong.append(f"at most {live.peak}, planned {most} with the margin")
    return [f"{changes}, rank {rank}: {said}, {came}, {plan}" for said in wrong]


def held_bytes(engine: Any) -> dict[str, int]:
    """Bytes of the storages that hold them, between the last backward pass of a step and the update."""
    weights = list(engine.model.parameters())
    if isinstance(engine, NativeEngine):
        masters = list(engine.masters.values())
        moments = [t for of in engine.optimizer.state.values() for t in (of.step, of.exp_avg, of.exp_avg_sq)]
        return parts_of(weights + masters, [master.grad for master in masters], moments)
    zero, stage = engine.optimizer, engine.stage
    gradients = [param.grad for param in engine.model.parameters()]
    if stage > 0:
        gradients += engine.state.reduced_gradients()
    if stage == 3:
        weights = [param.ds_tensor for param in weights] + zero.fp32_partitioned_groups_flat
    elif hasattr(zero, "fp32_groups_flat_partition"):  # its wrapper of bf16
        weights += zero.fp32_groups_flat_partition
    elif stage > 0:
        weights += zero.single_partition_of_fp32_groups
    weights += engine.state.kept.values()
    state = (zero.optimizer if stage > 0 else zero).state
    return parts_of(weights, gradients, [t for of in state.values() for t in of.values()])


def parts_of(
    weights: Iterable[Tensor | None], gradients: Iterable[Tensor | None], moments: Iterable[Tensor | None]
) -> dict[str, int]:
    return dict(parameters=total(weights), gradients=total(gradients), optimizer=total(moments))


def total(tensors: Iterable[Tensor | None]) -> int:
    """Of their storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def test_two_ranks() -> None:
    run_checks(2, [check_plans_are_what_ranks_measure], LAYOUTS)


@pytest.mark.slow
def test_two_ranks_in_more_layouts() -> None:
    run_checks(2, [check_plans_are_what_ranks_measure], MORE)
