import time
from dataclasses import replace
from typing import Any

import pytest

from moe_dist.config import Config, EngineConfig, ParallelConfig, TrainConfig, batch_shape, validate
from moe_dist.config.rules.memory import parts_of
from moe_dist.engine.exchange import zero_bucket
from moe_dist.models.backends import resolve_backends
from moe_dist.parallel.mesh import Layout, single_process_mesh
from moe_dist.plan.activations import blocks_of
from moe_dist.plan.held import Held, Tensor
from moe_dist.plan.live_memory import LiveMemory
from moe_dist.plan.memory import MemoryPlan, fullest, memory
from moe_dist.plan.stages import Sizes
from moe_dist.plan.states import WHOLE, States, states
from tests.dist.helpers import TinyRun, rows_that_came, tiny_config

TRAIN = TrainConfig(global_batch=32, accumulation=1)
MIB = 2**20
# Large enough that activations count, and a step takes a moment.
SMALL: dict[str, Any] = {
    "model__d_model": 64,
    "model__num_heads": 4,
    "model__moe": {"num_experts": 8, "d_ff": 128, "capacity_factor": None},
    "train__seq_len": 128,
}


def plan_of(config: Config, layout: Layout | None = None, rank: int = 0, device_type: str = "cpu") -> MemoryPlan:
    layout = layout or Layout()
    return memory(config, batch_shape(config.train, layout.dp), layout, rank, device_type=device_type)


def states_of(held: Held, layout: Layout, rank: int = 0, train: TrainConfig = TRAIN, **engine: Any) -> States:
    config = Config(engine=EngineConfig(**engine), train=train)
    return states(config, layout, held, rank, device_type="cpu")


def test_a_total_is_the_sum_of_its_parts() -> None:
    plan = MemoryPlan(1, 2, 4, 8, 16, 32, 64, 128)
    assert (plan.total, plan.expected) == (255, 127) and list(plan.parts.values()) == [2**n for n in range(8)]


@pytest.mark.parametrize(
    ("engine", "parameters", "gradients", "optimizer"),
    [
        ({"name": "native"}, 4, 4, 8),
        ({"name": "native", "precision": "bf16"}, 6, 4, 8),
        ({"name": "deepspeed", "zero_stage": 0}, 4, 4, 8),
        ({"name": "deepspeed", "zero_stage": 1}, 5, 4, 2),  # the one tensor lies in all partitions: its gradient whole
        ({"name": "deepspeed", "zero_stage": 1, "precision": "bf16"}, 3, 6, 2),
        ({"name": "deepspeed", "zero_stage": 2, "precision": "bf16"}, 3, 1, 2),
        ({"name": "deepspeed", "zero_stage": 3}, 2, 1, 2),
        ({"name": "deepspeed", "zero_stage": 3, "precision": "bf16"}, 1.5, 1, 2),
    ],
)
def test_states_by_hand(engine: dict[str, Any], parameters: float, gradients: float, optimizer: float) -> None:
    """MiB of 2^20 parameters in one tensor over four ranks; Adam counts its steps in four bytes."""
    kept = states_of(Held((Tensor("w", MIB),)), Layout(4), **engine)
    assert (kept.parameters, kept.gradients, kept.optimizer) == (
        parameters * MIB,
        gradients * MIB,
        optimizer * MIB + 4,
    )


def test_partitions_are_filled_up() -> None:
    """Groups of 9 dense and 5 expert elements over 4 and 2 ranks are filled up to 16 and 8: parts of 4. The first rank
    touches the dense tensors of 3 and 2 elements and the expert's; the last one none of the dense, which end at 9."""
    held = Held((Tensor("a", 3), Tensor("b", 2), Tensor("c", 4), Tensor("e", 5, expert=True)))
    first, last = (
        states_of(held, Layout(4, ep=2), rank, name="deepspeed", zero_stage=1, precision="fp32") for rank in (0, 3)
    )
    assert first.parameters == last.parameters == 4 * (16 + 8) + 4 * (4 + 4)
    assert first.optimizer == last.optimizer == 8 * (4 + 4) + 4 * 2
    assert first.gradients == 4 * (3 + 2 + 5)
    assert last.gradients == 4 * (4 + (5 + 3))  # nothing but zeros, and the expert's last element before three of them
    third = states_of(held, Layout(4, ep=2), 2, name="deepspeed", zero_stage=1, precision="fp32")
    assert third.gradients == 4 * ((4 + 3) + (5 + 3))
    cut = states_of(held, Layout(4, ep=2), name="deepspeed", zero_stage=3)
    assert cut.gradients == 4 * (1 + 1 + 1 + 3)


def test_bucket_and_groups_are_those_that_deepspeed_takes_by_itself() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from moe_dist.plan.states import GATHERED, SUB_GROUP

    zero = DeepSpeedZeroConfig(stage=3)
    assert zero.reduce_bucket_size == zero_bucket(EngineConfig(bucket_mib=None)) == WHOLE
    assert zero.sub_group_size == SUB_GROUP
    assert zero.max_reuse_distance == zero.max_live_parameters == GATHERED


CASES: dict[str, dict[str, Any]] = {
    "as it is": {"model__attention": {"backend": "flash"}},
    "packed": {"model__attention": {"backend": "packed"}},
    "packed, two heads": {"model__attention": {"backend": "packed"}, "model__num_kv_heads": 2},
    "plain maths": {"model__attention": {"backend": "torch"}},
    "block": {"model__attention": {"backend": "flash"}, "model__recompute": "block", "engine__precision": "bf16"},
    "loop, activated again": {
        "model__attention": {"backend": "flash"},
        "model__moe": SMALL["model__moe"] | {"experts": "loop"},
        "model__recompute": "activation",
    },
    "loop": {"model__attention": {"backend": "flash"}, "model__moe": SMALL["model__moe"] | {"experts": "loop"}},
    "head norms, windows, a gate, clamped": {
        "model__attention": {
            **{"backend": "flash", "qk_norm": "head", "qkv_bias": True, "out_bias": True},
            **{"window": [16, None], "rotary_share": 0.5},
        },
        "model__num_kv_heads": 2,
        "model__moe": SMALL["model__moe"]
        | {"first": 0, "num_shared_experts": 1, "shared_d_ff": 96, "shared_gate": True, "router_bias": True},
        "model__activation": "clamped_swiglu",
    },
    "width norms in bf16, clipped, one expert": {
        "model__attention": {"backend": "packed", "qk_norm": "width", "clip_qkv": 8.0},
        "model__moe": SMALL["model__moe"] | {"top_k": 1, "renormalize_top_1": True, "out_bias": True, "first": 1},
        "engine__precision": "bf16",
    },
    "sinks, dense first": {
        "model__attention": {"backend": "flash", "sinks": True, "qk_norm": "width"},
        "model__num_kv_heads": 4,
        "model__moe": SMALL["model__moe"] | {"first": 1},
    },
    "dense and shared": {
        "model__attention": {"backend": "flash"},
        "model__num_layers": 4,
        "model__moe": SMALL["model__moe"] | {"every": 2, "num_shared_experts": 1},
        "model__activation": "gelu",
        "train__accumulation": 2,
    },
    "LayerNorm, learned positions, biases": {
        "model__attention": {"backend": "flash", "position": "learned", "qkv_bias": True, "out_bias": True},
        "model__moe": SMALL["model__moe"] | {"first": 1},
        **{"model__norm": "layer", "model__ff_bias": True, "model__max_positions": 160, "model__activation": "gelu"},
    },
    "beside attention, one norm": {
        "model__attention": {"backend": "flash"},
        "model__moe": SMALL["model__moe"] | {"first": 1},
        **{"model__norm": "layer", "model__block": "parallel", "model__activation": "gelu_tanh"},
    },
    "beside attention, two norms": {
        **{"model__attention": {"backend": "flash"}, "model__moe": SMALL["model__moe"] | {"every": 2}},
        **{"model__norm": "layer", "model__block": "parallel_norms", "model__num_layers": 4},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_fullest_moment_of_a_step_of_one_process(name: str) -> None:
    """Within a twentieth of what is alive at most, counted storage by storage, given the rows that came."""
    config = tiny_config(**(SMALL | CASES[name]))
    with LiveMemory() as live:
        run = TinyRun(config, single_process_mesh())
        run.train(0, 1)
        live.forget_peak()
        came = rows_that_came(run, run.forward_backward(1)[1])
        run.engine.update(1e-3)
    plan = memory(config, run.shape, Layout(), device_type="cpu", came=came)
    assert plan.total == pytest.approx(live.peak, rel=0.05), (live.peak, came, plan)
    assert live.peak < plan_of(config).total


def test_what_must_cost_less_does() -> None:
    config = Config(train=TRAIN)
    plain = plan_of(config, Layout(4))
    block = replace(config, model=replace(config.model, recompute="block"))
    assert plan_of(block, Layout(4)).expected < plain.expected
    low = replace(config, engine=EngineConfig(precision="bf16"))
    assert plan_of(low, Layout(4)).activations < 0.7 * plain.activations
    cut = replace(config, parallel=ParallelConfig(tp=2, sequence_parallel=True))
    whole = replace(config, parallel=ParallelConfig(tp=2))
    assert plan_of(cut, Layout(4, tp=2)).activations < plan_of(whole, Layout(4, tp=2)).activations
    half = replace(config, train=TrainConfig(global_batch=32, micro_batch=4))
    assert plan_of(half, Layout(4)).activations == pytest.approx(plain.activations / 2, rel=0.01)


def test_capacity_bounds_the_margin() -> None:
    spread, margins = Layout(4, ep=4), []
    for factor in (1.0, 1.25, None):
        config = Config(train=TRAIN, parallel=ParallelConfig(ep=4))
        config.model.moe.capacity_factor = factor
        margins.append(plan_of(config, spread, device_type="cuda").margin)
    assert margins[0] == 0 < margins[1] < margins[2]
    config.model.moe.capacity_factor = 0.5  # half of the rows are dropped
    kept = plan_of(config, spread, device_type="cuda")
    config.model.moe.capacity_factor = None
    assert kept.dispatch == pytest.approx(plan_of(config, spread, device_type="cuda").dispatch / 2, rel=0.01)


def test_the_fullest_rank_is_the_one_that_holds_and_reads_most() -> None:
    config = tiny_config(parallel__ep=4, model__moe__d_ff=[16, 96, 192, 48])
    shape, layout = validate(config, 4), Layout(4, ep=4)
    totals = [memory(config, shape, layout, rank).total for rank in range(4)]
    assert fullest(config, shape, layout)[0] == 2 == totals.index(max(totals))
    # Ranks that share heads unevenly, but read as many of them, are alike.
    config = tiny_config(model__d_model=48, model__num_heads=12, model__num_kv_heads=3, parallel__tp=2)
    assert fullest(config, validate(config, 2), Layout(2, tp=2))[0] == 0
    even = tiny_config()
    assert fullest(even, validate(even, 8), Layout(8))[0] == 0


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rule_against_absurd_sizes_refuses_nothing_that_fits(stage: int, precision: Any) -> None:
    """Its lower bound of what is held is below what the plan counts to the byte, whatever the layout."""
    for ep, tp, every in ((1, 1, 1), (4, 2, 2), (2, 4, 1)):
        engine = EngineConfig(name="deepspeed" if stage else "native", zero_stage=stage, precision=precision)
        config = Config(engine=engine, parallel=ParallelConfig(ep=ep, tp=tp), train=TRAIN)
        config.model.moe.every = every
        shape = validate(config, 8)
        bound = sum(part.size for part in parts_of(config, shape) if part.what != "activations")
        assert bound <= plan_of(config, Layout(8, ep=ep, tp=tp)).sure, (ep, tp, every)


def test_a_search_can_ask_for_hundreds_of_layouts() -> None:
    """94 layers of 128 experts on 1,024 ranks: well under a second each, whatever was asked before."""
    config = Config(train=TrainConfig(global_batch=2048, micro_batch=1, seq_len=4096))
    model = config.model
    model.d_model, model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim = 4096, 94, 64, 4, 128
    model.vocab_size, model.d_ff = 151936, 12288
    model.moe.num_experts, model.moe.top_k, model.moe.d_ff, model.moe.capacity_factor = 128, 8, 1536, None
    layouts = [Layout(1024, ep=ep, tp=tp) for ep in (1, 2, 8, 32, 64, 128) for tp in (1, 2, 4, 8)]
    began = time.process_time()
    for layout in layouts:
        config.parallel = ParallelConfig(ep=layout.ep, tp=layout.tp)
        assert plan_of(config, layout, device_type="cuda").total > 0
    assert (time.process_time() - began) / len(layouts) < 0.25


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": False}, {"task": "classification"}])
def test_every_gradient_is_made_once(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    held = Held.of(config, Layout())
    sizes = Sizes.of(config, validate(config, 1), Layout(), 0, resolve_backends(config.model, 1), False)
    stages = [stage for block in blocks_of(sizes, held, config.task != "classification") for stage in block.stages]
    assert sum(stage.elements for stage in stages) == held.elements
