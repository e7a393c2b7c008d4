"""Steps in worlds that are not there: what agrees, and what is found where it does not."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

import moe_dist.engine.native
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import Axis, Layout, Mesh, mesh_without_processes
from moe_dist.plan.dry_run import DryRun, RankRun, dry_run, kinds, mismatches, text
from moe_dist.plan.recorder import Call
from tests.dist.helpers import tiny_config

WORLD = 16
SMALL: dict[str, Any] = {"parallel__ep": 4, "train__global_batch": 8, "model__num_layers": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "ep over tp, block again": {
        "parallel__ep": 8,
        "parallel__tp": 2,
        "model__moe__num_experts": 16,
        "model__recompute": "block",
        "train__accumulation": 2,
        "train__global_batch": 16,
    },
    "sequence parallel, etp, hierarchical, fp8, bf16": {
        "parallel__ep": 4,
        "parallel__etp": 2,
        "parallel__tp": 2,
        "parallel__node_size": 4,
        "parallel__sequence_parallel": True,
        "model__moe__dispatch": "hierarchical",
        "model__moe__wire_dtype": "fp8",
        "model__moe__capacity_factor": None,
        "engine__precision": "bf16",
    },
    "all_gather, attention experts": {
        "parallel__ep": 4,
        "model__attention__kind": "switch",
        "model__attention__moe": {"num_experts": 4, "top_k": 1, "dispatch": "all_gather"},
        "model__moe__wire": "padded",
        "train__global_batch": 16,
    },
    "ZeRO-1 in bf16": {
        "parallel__ep": 4,
        "engine__name": "deepspeed",
        "engine__zero_stage": 1,
        "engine__precision": "bf16",
        "train__global_batch": 16,
    },
    "ZeRO-3": {
        "parallel__ep": 4,
        "parallel__tp": 2,
        "engine__name": "deepspeed",
        "engine__zero_stage": 3,
        "model__recompute": "block",
    },
    "norms over the width, gated shared experts, biases, block again": {
        "parallel__ep": 4,
        "parallel__tp": 2,
        "parallel__sequence_parallel": True,
        "model__recompute": "block",
        "model__attention": {"qk_norm": "width", "qkv_bias": True, "out_bias": True, "rotary_share": 0.5},
        "model__moe": {
            **{"num_experts": 4, "first": 0, "num_shared_experts": 1, "shared_d_ff": 24, "shared_gate": True},
            **{"router_bias": True, "out_bias": True},
        },
        "model__activation": "clamped_swiglu",
        "train__global_batch": 16,
    },
    "a classifier that leaves tokens out": {
        "parallel__ep": 4,
        "task": "classification",
        "model__num_classes": 3,
        "model__token_dropout": 0.4,
        "data__kind": "csv",
        "data__paths": ["x"],
        "train__global_batch": 16,
    },
    "experts choose": {"parallel__ep": 4, "model__moe__router": "expert_choice", "train__global_batch": 16},
    "more experts than tokens, parts": {
        "parallel__ep": 16,
        "model__moe__num_experts": 64,
        "model__moe__overlap_chunks": 2,
        "train__seq_len": 8,
        "train__global_batch": 16,
    },
}

SLOW = ("ZeRO-1 in bf16", "ZeRO-3")  # DeepSpeed is imported, and takes three steps


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SHAPES])
def test_every_call_meets_and_is_as_planned(name: str) -> None:
    found = dry_run(tiny_config(model__num_layers=1, **SHAPES[name]), WORLD)
    assert found.problems == [] and found.compared > 0, text(found)
    assert all(run.differences == {} for run in found.ranks), text(found)
    assert all(any(call.collective == "all_to_all" for call in run.calls) for run in found.ranks)


def of(**changes: Any) -> DryRun:
    return dry_run(tiny_config(**(SMALL | changes)), 8)


def test_a_hash_spreads_tokens_nearly_as_planned() -> None:
    found = of(model__moe={"router": "hash", "num_experts": 4, "top_k": 1}, train__seq_len=256)
    assert found.problems == [] and {run.rank for run in found.ranks if run.differences}, text(found)
    for counted, planned in (both for run in found.ranks for both in run.differences.values()):
        assert counted == pytest.approx(planned, rel=0.3)


def test_what_no_rank_can_start_with() -> None:
    with pytest.raises(ValueError, match=r"train\.freeze: 'rooter' matches no parameter"):
        of(train__freeze=["rooter"])


def test_a_collective_that_one_rank_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = moe_dist.engine.native.clip_by_global_norm

    def skipped(grads: Any, params: Any, mesh: Mesh, max_norm: float | None) -> float:
        return 1.0 if mesh.rank == 3 else whole(grads, params, mesh, max_norm)

    monkeypatch.setattr(moe_dist.engine.native, "clip_by_global_norm", skipped)
    (problem,) = of().problems
    assert problem == (
        "rank 0 waits in all_reduce of a number float64 over ranks 0 to 3 in update of step 1, "
        "which rank 3 never enters"
    )


def test_a_shape_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Decoder.forward

    def narrowed(self: Decoder, tokens_BS: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.mesh.rank == 7:
            self.embedding.weight = torch.nn.Parameter(self.embedding.weight[:, :-1])
        return whole(self, tokens_BS, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", narrowed)
    problem = of().problems[0]
    assert problem.startswith("rank 7 fails in forward of step 1: RuntimeError: ") and "31" in problem, problem


def test_memory_that_overflows_and_what_a_model_holds() -> None:
    """fp32 without ZeRO: weight and two moments of each parameter are there before the step."""
    found = of()
    run = found.ranks[0]
    with torch.device("meta"):
        model = Decoder(found.config.model, mesh_without_processes(found.layout, 0))
    count = sum(param.numel() for param in model.parameters())
    assert 0 <= run.held - 12 * count < 4096, "and small buffers"
    assert run.peak > 16 * count, "gradients, and activations"
    limited = dry_run(
        tiny_config(parallel__ep=4, train__global_batch=8, model__num_layers=1), 8, memory_limit=run.peak - 1
    )
    assert "needs" in limited.problems[0] and "lower train.micro_batch" in limited.problems[0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="ep=3 does not divide world size 8"):
        of(parallel__ep=3)
    with pytest.raises(ValueError, match="rank 8 is not in a world of 8"):
        dry_run(tiny_config(), 8, ranks=[0, 8])
    assert not dist.is_initialized()


@pytest.mark.parametrize("layout", [Layout(16, ep=4, tp=2), Layout(24, 6, 2, 4, 2), Layout(16, ep=2, tp=8), Layout(4)])
def test_two_ranks_of_every_kind_of_group_run(layout: Layout) -> None:
    chosen = kinds(layout)
    axes = [axis for axis in get_args(Axis) if layout.even_nodes or not axis.startswith("ep_")]
    for axis in axes:
        groups = layout.groups(axis)
        if len(groups[0]) > 1:
            assert any(len(set(ranks) & set(chosen)) > 1 for ranks in groups), (axis, chosen)


def test_a_rank_alone() -> None:
    assert kinds(Layout(1)) == [0]


def test_calls_that_part() -> None:
    call = Call("all_to_all", (0, 1), "forward", "forward of step 1", ((4, 8),), torch.float32, 128, (1, 3), (1, 2))
    partner = replace(call, sent=(2, 2), received=(3, 2))
    first, second = RankRun(0, [call]), RankRun(1, [partner])
    assert mismatches(first, second) == []
    second.calls = [replace(partner, received=(4, 2))]
    assert "where 3 rows are sent and 4 expected" in mismatches(first, second)[0]
    second.calls = [replace(partner, dtype=torch.bfloat16)]
    assert "another element type" in mismatches(first, second)[0]
    second.calls = [replace(partner, collective="all_gather")]
    assert "another collective or group: rank 0 enters all_to_all of 4 x 8 float32" in mismatches(first, second)[0]
