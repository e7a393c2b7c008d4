import re

import pytest
import torch

from moe_dist.config import Config, EngineConfig, ParallelConfig, TrainConfig, batch_shape
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.advice import advice, changes, explained, shortage
from moe_dist.plan.memory import memory

TRAIN = TrainConfig(global_batch=32, accumulation=1)


def said_of(config: Config, layout: Layout, available: int | None = None) -> str:
    return advice(config, batch_shape(config.train, layout.dp), layout, device_type="cpu", available=available)


def test_what_to_change_is_named_with_what_it_saves() -> None:
    """In bf16 under ZeRO-1 on four ranks. Every saving is the difference of two plans, the cheapest change first."""
    engine = EngineConfig(name="deepspeed", zero_stage=1, precision="bf16")
    config, layout = Config(engine=engine, parallel=ParallelConfig(ep=2), train=TRAIN), Layout(4, ep=2)
    said = said_of(config, layout)
    plan = memory(config, batch_shape(TRAIN, 4), layout, device_type="cpu")
    assert f"{plan.parameters / 2**20:.1f} MiB of parameters" in said and f"({plan.moment})" in said
    order = ["lower train.micro_batch to 4 (it is 8;", "model.recompute to block (it is none)", "parallel.ep to 4"]
    places = [said.index(words) for words in order]
    assert places == sorted(places) and "engine.precision" not in said
    half = Config(engine=engine, parallel=ParallelConfig(ep=2), train=TrainConfig(global_batch=32, micro_batch=4))
    after = memory(half, batch_shape(half.train, 4), layout, device_type="cpu")
    found = re.search(r"accumulate over the rest\): saves ([0-9.]+) MiB", said)
    assert found is not None and float(found[1]) == pytest.approx((plan.total - after.total) / 2**20, abs=0.06)


def test_what_would_fit_is_said() -> None:
    config, layout = Config(train=TRAIN), Layout(4)
    plan = memory(config, batch_shape(TRAIN, 4), layout, device_type="cpu")
    said = said_of(config, layout, available=plan.total - 2**20)
    assert re.search(r"train.micro_batch to 4 [^;]*;[^;]*: saves [0-9.]+ MiB, and would fit", said)
    assert "would fit" not in said_of(config, layout, available=2**20)
    assert "would fit" not in said_of(config, layout)


def test_what_cannot_help_is_not_advised() -> None:
    config = Config(train=TrainConfig(global_batch=1))
    config.model.recompute = "block"
    said = said_of(config, Layout())
    assert "train.micro_batch is 1 already; lower train.seq_len to 128" in said
    assert not [word for word in ("recompute", "zero_stage", "parallel.ep", "parallel.tp") if word in said]


def test_ep_is_raised_to_what_divides() -> None:
    for ep, etp, experts, raised in ((2, 1, 8, 4), (2, 2, 8, None), (2, 1, 6, None), (1, 2, 8, 2)):
        config = Config(parallel=ParallelConfig(ep=ep, etp=etp), train=TRAIN)
        config.model.moe.num_experts = experts
        found = re.search(r"raise parallel\.ep to (\d+)", said_of(config, Layout(4, ep=ep, etp=etp)))
        assert (None if found is None else int(found[1])) == raised, (ep, etp, experts)


def test_every_change_is_one_of_a_run_that_could_be() -> None:
    """As the YAML would have it: the same configuration but for what the words say."""
    words = [change.words for change in changes(Config(train=TRAIN), Layout(4))]
    assert [word.split()[1] for word in words] == (
        "train.micro_batch model.recompute model.recompute engine.name engine.name engine.name parallel.ep parallel.tp "
        "engine.precision"
    ).split()


def test_a_run_that_surely_does_not_fit_is_refused_and_one_that_may_not_is_doubted() -> None:
    config, layout = Config(train=TRAIN), Layout(2)
    shape = batch_shape(TRAIN, 2)
    plan = memory(config, shape, layout, device_type="cpu")
    for ranks in (range(1), range(2)):
        sure, likely = len(ranks) * plan.sure, len(ranks) * plan.total
        assert shortage(config, shape, layout, ranks, likely, "cpu") == (None, None)
        refused, doubted = shortage(config, shape, layout, ranks, likely - 1, "cpu")
        assert refused is None and doubted is not None and "lower train.micro_batch" in doubted
        assert shortage(config, shape, layout, ranks, sure, "cpu")[0] is None
        refused, doubted = shortage(config, shape, layout, ranks, sure - 1, "cpu")
        assert doubted is None and refused is not None and "of parameters, gradients and optimizer state" in refused


def test_the_error_of_torch_itself() -> None:
    shape, said = batch_shape(TRAIN, 1), r"out of memory: a rank takes about .*lower train\.micro_batch"
    with (
        pytest.raises(RuntimeError, match=said) as caught,
        explained(Config(train=TRAIN), shape, Layout(), device_type="cpu"),
    ):
        torch.empty(2**60)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="another"), explained(Config(), shape, Layout(), device_type="cpu"):
        raise RuntimeError("another")
