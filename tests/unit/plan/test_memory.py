import pytest
import torch

from moe_dist.config import Config, EngineConfig, ParallelConfig, TrainConfig, batch_shape
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.models.parameters import parameter_counts
from moe_dist.parallel.mesh import Layout, mesh_without_processes
from moe_dist.plan.memory import Held, advice, explained

TRAIN = TrainConfig(global_batch=32, accumulation=1)


def test_bytes_by_hand_and_what_to_change() -> None:
    """2^20 parameters in bf16, ZeRO-1 over 4 ranks: 2 MiB, 4 MiB, and 12 / 4 = 3 MiB of masters and moments."""
    engine = EngineConfig(name="deepspeed", zero_stage=1, precision="bf16")
    config = Config(engine=engine, parallel=ParallelConfig(ep=2), train=TRAIN)
    said = advice(config, batch_shape(TRAIN, 4), Layout(4, ep=2), Held(dense=2**20))
    assert "1048576 parameters on this rank take about 2.0 MiB of weights, 4.0 MiB of gradients and 3.0 MiB" in said
    assert "lower train.micro_batch (it is 8;" in said and "model.recompute to block (it is none)" in said
    assert "raise engine.zero_stage (it is 1, over 4 ranks" in said
    assert "raise parallel.ep (it is 2, for 8 experts on 4 ranks)" in said
    assert "engine.precision" not in said


def test_what_cannot_help_is_not_advised() -> None:
    train = TrainConfig(global_batch=1)
    config = Config(train=train)
    config.model.recompute = "block"
    said = advice(config, batch_shape(train, 1), Layout(), Held(dense=2**30))
    assert "8.0 GiB of optimizer state" in said and "train.micro_batch is 1 already; lower train.seq_len" in said
    assert not [word for word in ("recompute", "zero_stage", "parallel.ep") if word in said]


def test_ep_is_not_to_be_raised_where_no_larger_one_fits() -> None:
    for ep, etp, experts, raised in ((2, 1, 8, True), (2, 2, 8, False), (2, 1, 6, False), (1, 2, 8, True)):
        config = Config(parallel=ParallelConfig(ep=ep, etp=etp), train=TRAIN)
        config.model.moe.num_experts = experts
        said = advice(config, batch_shape(TRAIN, 4), Layout(4, ep=ep, etp=etp), Held(dense=2**20))
        assert ("raise parallel.ep" in said) is raised, (ep, etp, experts)


def test_zero_keeps_masters_of_fp32_weights_too() -> None:
    config = Config(engine=EngineConfig(name="deepspeed", zero_stage=1), train=TRAIN)
    assert "3.0 MiB of optimizer state" in advice(config, batch_shape(TRAIN, 4), Layout(4), Held(dense=2**20))


def test_zero_cuts_experts_over_edp() -> None:
    """Of 2^20 dense and 2^20 expert parameters over dp 4 and edp 2, fp32, ZeRO-2: 4 * (2^18 + 2^19) of gradients."""
    config = Config(engine=EngineConfig(name="deepspeed", zero_stage=2), parallel=ParallelConfig(ep=2), train=TRAIN)
    said = advice(config, batch_shape(TRAIN, 4), Layout(4, ep=2), Held(dense=2**20, expert=2**20))
    assert "2097152 parameters" in said and "8.0 MiB of weights, 3.0 MiB of gradients and 9.0 MiB" in said


def test_what_a_model_will_hold_is_what_it_holds() -> None:
    """Before there is memory for it, on every rank of a layout; together the ranks hold each expert once."""
    model, layout = resolve_backends(Config().model, 4), Layout(4, ep=4, tp=2)
    told = []
    for rank in range(layout.world):
        mesh = mesh_without_processes(layout, rank)
        with torch.device("meta"):
            told.append(Held.by(Decoder(model, mesh)))
        sizes = {name: param.numel() for name, param in Decoder(model, mesh).named_parameters()}
        assert told[-1].expert == sum(size for name, size in sizes.items() if ".experts." in name)
        assert told[-1].dense + told[-1].expert == sum(sizes.values())
    assert sum(held.expert for held in told) == parameter_counts(model).expert > 0


def test_the_error_of_torch_itself() -> None:
    shape, few, said = batch_shape(TRAIN, 1), Held(dense=5), r"out of memory: 5 parameters.*lower train\.micro_batch"
    with (
        pytest.raises(RuntimeError, match=said) as caught,
        explained(Config(train=TRAIN), shape, Layout(), few),
    ):
        torch.empty(2**60)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with (
        pytest.raises(RuntimeError, match="another"),
        explained(Config(), shape, Layout(), few),
    ):
        raise RuntimeError("another")
