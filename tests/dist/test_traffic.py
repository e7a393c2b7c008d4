"""What a plan says of traffic against what real steps hand to gloo: calls and bytes, by collective and group."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.mesh import create_mesh
from moe_dist.plan.recorder import Recorder
from moe_dist.plan.traffic import traffic
from moe_dist.plan.transfer import Transfer
from moe_dist.step import Site, StepContext
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.record.statistics import gather_statistics
from moe_dist.train.record.step_clock import OWN
from tests.dist.helpers import KEY, TinyRun, run_checks, tiny_config

ZERO = {"engine__name": "deepspeed"}
LOW = {"engine__precision": "bf16"}
# Of each, what is unlike the ones before. ZeRO-3 has its pace from the third step on.
LAYOUTS: dict[str, dict[str, Any]] = {
    "native ep": {"parallel__ep": 2, "train__accumulation": 2},
    "native ep over tp, block again": {
        "parallel__ep": 4,
        "parallel__tp": 2,
        "model__recompute": "block",
        "model__moe__num_shared_experts": 1,
        "model__moe__balance_scope": "sequence",
        "model__moe__wire_dtype": "fp8",
    },
    "native sequence parallel, etp, hierarchical": {
        "parallel__ep": 2,
        "parallel__etp": 2,
        "parallel__tp": 2,
        "parallel__node_size": 2,
        "parallel__sequence_parallel": True,
        "model__recompute": "block",
        "model__moe__dispatch": "hierarchical",
        "model__moe__capacity_factor": None,
        "model__moe__balance": "loss+quantile",
    },
    "native padded parts, local limits": {
        "parallel__ep": 2,
        "model__moe__wire": "padded",
        "model__moe__overlap_chunks": 2,
        "model__moe__capacity_scope": "local",
        "model__moe__drop_policy": "score",
        "model__moe__wire_dtype": "bf16",
        "model__moe__every": 2,
    },
    "native all_gather, pools by choice": {
        "parallel__ep": 2,
        "parallel__tp": 4,
        "model__moe__dispatch": "all_gather",
        "model__moe__wire_dtype": "fp8",
        "model__moe__capacity_pool": 2,
        "model__moe__drop_order": "choice",
        "model__attention__qk_ln": True,
        "model__tie_embeddings": False,
    },
    "native all experts here, biases": {
        "parallel__tp": 2,
        "model__moe__expert_bias": True,
        "model__moe__router": "noisy",
        "model__moe__drop_policy": "random",
        "model__num_kv_heads": 2,
    },
    "native attention experts": {
        "parallel__ep": 2,
        "parallel__tp": 2,
        "model__recompute": "block",
        "model__attention__kind": "switch",
        "model__attention__moe": {"num_experts": 2, "top_k": 1, "dispatch": "all_gather"},
        "model__moe__dispatch": "all_to_all",
        "model__moe__wire": "padded",
    },
    "native expert choice, bf16": LOW
    | {"parallel__ep": 2, "model__moe__router": "expert_choice", "model__moe__capacity_factor": 1.0},
    "native biases, gated shared experts, width norms of shared keys": {
        "parallel__ep": 2,
        "parallel__tp": 2,
        "parallel__sequence_parallel": True,
        "model__recompute": "block",
        "model__attention": {"qk_norm": "width", "qkv_bias": True, "out_bias": True, "sinks": True},
        "model__moe": {
            **{"num_experts": 4, "num_shared_experts": 1, "shared_d_ff": 24, "shared_gate": True},
            **{"router_bias": True, "out_bias": True},
        },
    },
    "native head norms, dense first, gated shared experts, windows": {
        "parallel__tp": 2,
        "model__num_layers": 3,
        "model__recompute": "block",
        "model__attention": {"qk_norm": "head", "qkv_bias": True, "rotary_share": 0.5, "window": [8, None]},
        "model__moe": {
            **{"num_experts": 4, "first": 1, "num_shared_experts": 2, "shared_gate": True, "out_bias": True},
            **{"router": "sigmoid", "router_bias": True, "top_k": 1, "renormalize_top_1": True, "expert_bias": True},
        },
        "model__activation": "clamped_swiglu",
    },
    "native attention experts, sequence parallel, bias": {
        "parallel__ep": 2,
        "parallel__tp": 2,
        "parallel__sequence_parallel": True,
        "model__recompute": "block",
        "model__num_kv_heads": 2,
        "model__attention": {"kind": "switch", "out_bias": True, "moe": {"num_experts": 2, "router_bias": True}},
    },
    "native LayerNorm, learned positions, biases, feed-forwards beside attention": {
        "parallel__ep": 2,
        "parallel__tp": 2,
        "parallel__sequence_parallel": True,
        "model__recompute": "block",
        "model__norm": "layer",
        "model__block": "parallel",
        "model__ff_bias": True,
        "model__activation": "gelu_tanh",
        "model__max_positions": 20,
        "model__attention": {"position": "learned", "qkv_bias": True, "out_bias": True},
        "model__moe": {"num_experts": 4, "first": 1},
    },
    "ZeRO-1 bf16, width norms": ZERO
    | LOW
    | {
        **{"engine__zero_stage": 1, "parallel__ep": 2, "parallel__tp": 2, "model__num_kv_heads": 2},
        "model__attention": {"qk_norm": "width", "qkv_bias": True},
        # 6 numbers of the router's bias: parts are filled up.
        "model__moe": {"num_experts": 6, "first": 0, "every": 2, "router_bias": True, "out_bias": True},
    },
    "ZeRO-0 ep over tp": ZERO | {"parallel__ep": 4, "parallel__tp": 2, "model__moe__router": "sinkhorn"},
    "ZeRO-1 ep": ZERO | {"engine__zero_stage": 1, "parallel__ep": 2, "train__accumulation": 2},
    "ZeRO-1 bf16": ZERO | LOW | {"engine__zero_stage": 1, "parallel__ep": 2, "parallel__tp": 2},
    "ZeRO-2 bf16": ZERO
    | LOW
    | {"engine__zero_stage": 2, "parallel__ep": 2, "parallel__tp": 2, "train__accumulation": 2},
    "ZeRO-3 ep, block again": ZERO
    | {"engine__zero_stage": 3, "parallel__ep": 2, "train__accumulation": 2, "model__recompute": "block"},
    "ZeRO-3 ep over tp, bf16": ZERO | LOW | {"engine__zero_stage": 3, "parallel__ep": 4, "parallel__tp": 2},
}


class Counted:
    """A witness that counts what each expert keeps of this rank's tokens, by micro-step and layer."""

    def __init__(self, experts: dict[str, int]) -> None:
        self.experts = experts  # by kind of site
        self.kept: dict[tuple[int, Site], Tensor] = {}
        self.micro = 0

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        return scores

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        self.kept[self.micro, site] = torch.bincount(experts_TK[kept_TK], minlength=self.experts[site.kind])

    def of_all(self) -> dict[tuple[int, Site], Tensor]:
        found = {}
        for key, kept_E in self.kept.items():
            counts = [torch.empty_like(kept_E) for _ in range(dist.get_world_size())]
            dist.all_gather(counts, kept_E)
            found[key] = torch.stack(counts)
        return found


def compare(changes: dict[str, Any]) -> None:
    """Every step of a layout, on this rank."""
    several = {} if "engine__name" in changes else {"engine__bucket_mib": 0.02}  # ZeRO fills them as gradients come
    config = tiny_config(**several | changes)
    parallel = config.parallel
    run = TinyRun(config, create_mesh(parallel.ep, parallel.tp, parallel.etp, parallel.node_size))
    trail, device = run.mesh.trail, torch.device("cpu")
    for step in range(3 if config.engine.zero_stage == 3 else 1):
        model = run.config.model
        counted = Counted({"feed_forward": model.moe.num_experts, "attention": model.attention.moe.num_experts})
        with Recorder(trail) as seen:
            assert StopGuard().agreed(run.mesh.world, device) is None
            outputs = []
            for counted.micro in range(run.shape.accumulation):
                context = StepContext(KEY.fold(step, counted.micro), step=step, witness=counted)
                outputs.append(run.engine.micro_step(*run.batch(step, counted.micro), context))
            gather_statistics(outputs, run.mesh, device, [0.0] * len(OWN))
            trail.enter("update")
            run.engine.update(1e-3)
    layout, rank = run.mesh.layout, run.mesh.rank
    planned = traffic(run.config, run.shape, layout, rank, counted.of_all(), step=step, device_type="cpu")
    found, expected = totals(seen.transfers(layout, rank)), totals(planned)
    wrong = {
        key: (found.get(key), expected.get(key)) for key in found | expected if found.get(key) != expected.get(key)
    }
    assert not wrong, f"(calls, bytes) counted and planned: {wrong}; planned lines {planned}"


def totals(transfers: list[Transfer]) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
    """(calls, bytes) by collective and group."""
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()
    size: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for transfer in transfers:
        calls[transfer.collective, transfer.ranks] += transfer.calls
        size[transfer.collective, transfer.ranks] += transfer.bytes
    return {key: (calls[key], size[key]) for key in calls}


def check_planned_is_counted() -> None:
    for name, changes in LAYOUTS.items():
        try:
            compare(changes)
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planned_traffic_is_what_real_steps_exchange() -> None:
    run_checks(4, [check_planned_is_counted])
