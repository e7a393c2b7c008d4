"""Frozen parameters in every engine and layout: their bits stay, the others learn as on one process, no moments."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.layout import Manifest, RunInfo
from moe_dist.checkpoint.reshard import load
from moe_dist.checkpoint.retention import Retention
from moe_dist.engine.base import Kind
from moe_dist.parallel.mesh import create_mesh, single_process_mesh
from moe_dist.parallel.objects import broadcast_json
from moe_dist.plan.held import Held
from moe_dist.plan.states import states
from tests.dist.helpers import TinyRun, assert_same, logical, run_checks, tiny_config
from tests.dist.test_memory import held_bytes

ZERO: list[dict[str, Any]] = [{"engine__name": "deepspeed", "engine__zero_stage": stage} for stage in range(4)]
EP2, TP2, BF16 = {"parallel__ep": 2}, {"parallel__tp": 2}, {"engine__precision": "bf16"}
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
# Nothing before the first experts asks for a gradient; no expert does, so that DeepSpeed has none to reduce; a router
# of the same layer, and a recomputed block, with both.
FIRST = ["embedding.*", "blocks.0.attention*", "blocks.0.feed_forward_norm.*"]
EXPERTS = ["blocks.*.experts.*", "blocks.1.feed_forward.router.*", "output.norm.*"]
Case = tuple[list[str], dict[str, Any]]
CASES: list[Case] = [(FIRST, EP2), (FIRST, ZERO[3] | EP2), (EXPERTS, ZERO[1] | EP2)]
MORE: list[Case] = [
    *((FIRST, layout) for layout in (ZERO[1] | TP2, ZERO[2] | EP2, ZERO[3] | EP2 | {"model__recompute": "block"})),
    *((EXPERTS, layout) for layout in (TP2, ZERO[0] | EP2, ZERO[2] | EP2, ZERO[3] | EP2)),
    (EXPERTS, EP2 | {"train__accumulation": 2, "model__tie_embeddings": False}),
]


def start(patterns: list[str], **changes: Any) -> TinyRun:
    config = tiny_config(train__freeze=patterns, model__moe__capacity_factor=None, **changes)
    return TinyRun(config, create_mesh(config.parallel.ep, config.parallel.tp))


def frozen_in(run: TinyRun) -> set[str]:
    return {name for name, param in run.engine.model.named_parameters() if not param.requires_grad}


def check_others_learn_as_on_one_process(cases: list[Case]) -> None:
    oracles: dict[str, Any] = {}
    for patterns, layout in cases:
        run = start(patterns, **layout)
        frozen, before = frozen_in(run), logical(run.engine, "weight")
        assert frozen and any(not name.startswith("blocks.1.") for name in frozen)
        model = {name: value for name, value in layout.items() if not name.startswith(("engine", "parallel"))}
        key = repr((patterns, model))
        if key not in oracles:
            alone = TinyRun(tiny_config(train__freeze=patterns, model__moe__capacity_factor=None, **model),
                            single_process_mesh())  # fmt: skip
            losses = alone.train(0, 2)
            oracles[key] = losses, {kind: whole(alone, kind) for kind in ("weight", *MOMENTS)}
        losses, expected = oracles[key]
        found = run.train(0, 2)
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-5, (layout, found, losses)
        after = logical(run.engine, "weight")
        for name in frozen:
            assert torch.equal(after[name], before[name]), f"{name} moved under {layout}"
        assert_same(after, expected["weight"], rtol=1e-3, atol=1e-6)
        moved = [name for name in after if not torch.equal(after[name], before[name])]
        assert len(moved) == len([name for name in after if name not in frozen and ".open_E" not in name])
        assert_planned(run)
        for kind in MOMENTS:
            held = logical(run.engine, kind)
            assert held.keys() == expected[kind].keys() == expected["weight"].keys() - frozen - buffers(run)
            assert_same(held, expected[kind], rtol=1e-3, atol=1e-6)


def assert_planned(run: TinyRun) -> None:
    """The plan of memory has no gradients and no moments of what is frozen, to the byte."""
    run.forward_backward(9)
    layout, rank = run.mesh.layout, run.mesh.rank
    planned = states(run.config, layout, Held.of(run.config, layout, rank), rank, device_type="cpu")
    said = {name: getattr(planned, name) for name in ("parameters", "gradients", "optimizer")}
    assert held_bytes(run.engine) == said, run.config.engine
    run.engine.discard()


def whole(run: TinyRun, kind: Kind) -> dict[str, torch.Tensor]:
    pieces = run.engine.held(kind)
    return {piece.name: piece.values.detach().double().view(piece.logical_shape).clone() for piece in pieces}


def buffers(run: TinyRun) -> set[str]:
    return {name for name, _ in run.engine.model.named_buffers()}


def check_fp32_values_stay_where_less_is_computed_with(_: list[Case]) -> None:
    """What a checkpoint says of frozen parameters is fp32, and computes as its rounding; also once it was loaded."""
    folder = Path(broadcast_json(mkdtemp() if dist.get_rank() == 0 else None))
    source = start([], **EP2)
    source.train(0, 1)
    step_1 = save(source, folder / "all", 1)
    for engine in ({}, *ZERO[1:]):
        run = start(FIRST, **EP2, **BF16, **engine)
        load(step_1, run.engine)
        frozen, before = frozen_in(run), logical(source.engine, "weight")
        assert any((before[name] != before[name].bfloat16().double()).any() for name in frozen)
        run.train(1, 2)
        after = logical(run.engine, "weight")
        moved = [name for name in frozen if not torch.equal(after[name], before[name])]
        assert moved == [], (engine, moved)
        stage = engine.get("engine__zero_stage")
        if stage != 3:  # there it lies in pieces
            for name, param in run.engine.model.named_parameters():
                if name in frozen and "embedding" not in name:
                    assert torch.equal(param.detach().float(), before[name].float().bfloat16().float()), name
        assert_planned(run)
        step_2 = save(run, folder / f"frozen-{stage}", 2)
        manifest = Manifest.load(step_2)
        assert set(manifest.frozen) == frozen and manifest.kinds == ["weight", *MOMENTS]
        # Another layout, in which they are trained again: moments of zero for them, the others' as they were.
        again = start([], **TP2)
        load(step_2, again.engine)
        for kind in MOMENTS:
            moments, earlier = logical(again.engine, kind), logical(run.engine, kind)
            assert all(bool((moments[name] == 0).all()) for name in frozen)
            assert_same({name: moments[name] for name in earlier}, earlier)
        again.train(2, 3)
        assert not torch.equal(logical(again.engine, "weight")["embedding.weight"], before["embedding.weight"])


def save(run: TinyRun, root: Path, step: int) -> Path:
    return Saver(root, run.mesh, Retention(), RunInfo()).save(run.engine, step)


def test_two_ranks() -> None:
    run_checks(2, [check_others_learn_as_on_one_process], CASES)


@pytest.mark.slow
def test_two_ranks_in_more_layouts() -> None:
    checks = [check_others_learn_as_on_one_process, check_fp32_values_stay_where_less_is_computed_with]
    run_checks(2, checks, MORE)
