"""Engines beside each other: bf16 against fp32, and ZeRO-3 outside of `verify`."""

import torch
import torch.distributed as dist

from moe_dist.moe.routing import StepContext
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import create_mesh
from tests.dist.helpers import KEY, TinyRun, assert_same, logical, run_checks, tiny_config

DEEPSPEED = {"engine__name": "deepspeed"}
# Dropless, because rounding that sends one token elsewhere must not decide which others are dropped.
LEARN = {"optim__lr": 3e-3, "model__moe__capacity_factor": None}


def check_bf16_follows_fp32() -> None:
    """Native, ZeRO-1 and ZeRO-2 at ep = 2: losses fall, and stay within 2e-2 of fp32. ZeRO-3 too, at ep = 1."""
    reference = TinyRun(tiny_config(parallel__ep=2, **LEARN), create_mesh(2, 1)).train(0, 20)
    assert sum(reference[-3:]) < sum(reference[:3]) - 0.3, reference
    for ep, engine in (
        (2, {}),
        (2, DEEPSPEED | {"engine__zero_stage": 1}),
        (2, DEEPSPEED | {"engine__zero_stage": 2}),
        (1, DEEPSPEED | {"engine__zero_stage": 3}),
    ):
        run = TinyRun(tiny_config(parallel__ep=ep, engine__precision="bf16", **LEARN, **engine), create_mesh(ep, 1))
        losses = run.train(0, 20)
        off = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        assert off < 2e-2, f"{engine}: {off}"
        assert losses[-1] < losses[0]
        # What is saved is fp32, and what computes is its rounding.
        weights = logical(run.engine, "weight")
        assert any((w != w.bfloat16().double()).any() for w in weights.values()), "masters are no more than bf16"


def check_zero3_evaluates_between_steps() -> None:
    """Logits, token losses and training interleaved give what the native engine gives."""
    mesh = create_mesh(1, dist.get_world_size())
    for tp in (1, mesh.tp.size):
        mesh = create_mesh(1, tp)
        outcomes = []
        for engine in ({}, DEEPSPEED | {"engine__zero_stage": 3}):
            run = TinyRun(tiny_config(parallel__tp=tp, model__recompute="block", **engine), mesh)
            tokens_BS, targets_BS = run.batch(50)
            seen = []
            for step in range(2):
                run.train(step, step + 1)
                context = StepContext(KEY, "dropless")
                seen.append(run.engine.evaluate(tokens_BS, targets_BS, context, "token_losses"))
                seen.append(run.engine.evaluate(tokens_BS, None, context, "logits"))
            outcomes.append(([all_gather(x.contiguous(), mesh.dp) for x in seen], logical(run.engine, "weight")))
        (expected, weights), (found, zero_weights) = outcomes
        for actual, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=2e-5)
        assert_same(zero_weights, weights, atol=1e-6)


def check_every_stage_tells_the_same_state() -> None:
    """Gradients, masters and moments of each stage, read by logical name, after two steps: those of the oracle."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    oracle = TinyRun(tiny_config(), create_mesh(1, 1))
    oracle.train(0, 2)
    oracle.forward_backward(2)
    grads, state = logical(oracle.engine, "grad"), {kind: logical(oracle.engine, kind) for kind in kinds}
    for stage in range(4):
        for ep in (1, 2) if stage < 3 else (1,):
            run = TinyRun(tiny_config(parallel__ep=ep, engine__zero_stage=stage, **DEEPSPEED), create_mesh(ep, 1))
            run.train(0, 2)
            run.forward_backward(2)
            assert_same(logical(run.engine, "grad"), grads, rtol=1e-3, atol=1e-6)
            for kind in kinds:
                assert_same(logical(run.engine, kind), state[kind], rtol=1e-3, atol=1e-6)


def test_two_ranks() -> None:
    run_checks(
        2, [check_every_stage_tells_the_same_state, check_zero3_evaluates_between_steps, check_bf16_follows_fp32]
    )
