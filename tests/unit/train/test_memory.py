import pytest
import torch

from moe_dist.config import Config, EngineConfig, ParallelConfig, TrainConfig, batch_shape
from moe_dist.parallel.mesh import Layout
from moe_dist.train.memory import advice, explained

TRAIN = TrainConfig(global_batch=32, accumulation=1)


def test_bytes_by_hand_and_what_to_change() -> None:
    """2^20 parameters in bf16, ZeRO-1 over 4 ranks: 2 MiB, 4 MiB, and 12 / 4 = 3 MiB of masters and moments."""
    engine = EngineConfig(name="deepspeed", zero_stage=1, precision="bf16")
    config = Config(engine=engine, parallel=ParallelConfig(ep=2), train=TRAIN)
    said = advice(config, batch_shape(TRAIN, 4), Layout(4, ep=2), 2**20)
    assert "1048576 parameters on this rank take about 2.0 MiB of weights, 4.0 MiB of gradients and 3.0 MiB" in said
    assert "lower train.micro_batch (it is 8;" in said and "model.recompute to block (it is none)" in said
    assert "raise engine.zero_stage (it is 1, over 4 ranks" in said
    assert "raise parallel.ep (it is 2, for 8 experts on 4 ranks)" in said
    assert "engine.precision" not in said


def test_what_cannot_help_is_not_advised() -> None:
    train = TrainConfig(global_batch=1)
    config = Config(train=train)
    config.model.recompute = "block"
    said = advice(config, batch_shape(train, 1), Layout(), 2**30)
    assert "8.0 GiB of optimizer state" in said and "train.micro_batch is 1 already; lower train.seq_len" in said
    assert not [word for word in ("recompute", "zero_stage", "parallel.ep") if word in said]


def test_ep_is_not_to_be_raised_where_no_larger_one_fits() -> None:
    for ep, etp, experts, raised in ((2, 1, 8, True), (2, 2, 8, False), (2, 1, 6, False), (1, 2, 8, True)):
        config = Config(parallel=ParallelConfig(ep=ep, etp=etp), train=TRAIN)
        config.model.moe.num_experts = experts
        said = advice(config, batch_shape(TRAIN, 4), Layout(4, ep=ep * etp), 2**20)
        assert ("raise parallel.ep" in said) is raised, (ep, etp, experts)


def test_zero_keeps_masters_of_fp32_weights_too() -> None:
    config = Config(engine=EngineConfig(name="deepspeed", zero_stage=1), train=TRAIN)
    assert "3.0 MiB of optimizer state" in advice(config, batch_shape(TRAIN, 4), Layout(4), 2**20)


def test_the_error_of_torch_itself() -> None:
    shape, said = batch_shape(TRAIN, 1), r"out of memory: 5 parameters.*lower train\.micro_batch"
    with pytest.raises(RuntimeError, match=said) as caught, explained(Config(train=TRAIN), shape, Layout(), 5):
        torch.empty(2**60)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="another"), explained(Config(), batch_shape(TRAIN, 1), Layout(), 5):
        raise RuntimeError("another")
