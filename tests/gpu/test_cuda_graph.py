"""Steps replayed as CUDA graphs against the same steps launched kernel by kernel, bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.make import make_engine
from moe_dist.engine.native import NativeEngine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

D, LENGTH, ROWS, STEPS = 64, 32, 4, 8
MOE = MoEConfig(num_experts=8, top_k=2, d_ff=96, capacity_factor=1.0)
CASES = {
    "a limit": MOE,
    "switch": replace(MOE, top_k=1, capacity_factor=0.75),
    "padded wire, bmm": replace(MOE, dispatch="all_to_all", wire="padded", experts="bmm"),
    "padded wire, pools": replace(MOE, dispatch="all_to_all", wire="padded", capacity_pool=4, pool_floor=0.5),
    "triton experts": replace(MOE, experts="triton"),
    "dropless": replace(MOE, capacity_factor=None),
    "score, rerouted": replace(MOE, drop_policy="score", overflow="reroute"),
    "quantile, schedule": replace(MOE, balance="quantile", capacity_schedule={5: 0.5}),
}


def trained(
    moe: MoEConfig, device: torch.device, graph: bool, precision: str = "bf16", recompute: str = "none"
) -> tuple[list[float], dict[str, Tensor], NativeEngine]:
    """Losses and gradient norms, and all weights, after steps of two micro-steps; one step is left out."""
    model = ModelConfig(
        **dict(vocab_size=64, d_model=D, num_layers=2, num_heads=4, d_ff=96, moe=moe, recompute=recompute)  # type: ignore[arg-type]
    )
    model = resolve_backends(model, 1, device.type, LENGTH)
    mesh = single_process_mesh()
    settings: Any = dict(precision=precision, cuda_graph=graph)
    engine = make_engine(Decoder(model, mesh).to(device), mesh, EngineConfig(**settings), OptimConfig(), ROWS, 2)
    assert isinstance(engine, NativeEngine)
    generator, told = torch.Generator().manual_seed(3), []
    for step in range(STEPS):
        outputs = []
        for micro in range(2):
            ids = torch.randint(64, (ROWS, LENGTH + 1), generator=generator).to(device)
            context = StepContext(RandomKey.of("graph", step, micro), step=step)
            outputs.append(engine.micro_step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), context))
        told += [float(output.nll) for output in outputs]
        told += [float(stats.kept_E.sum()) for output in outputs for stats in output.stats]
        if step == 4:
            engine.discard()
        else:
            told.append(engine.update(1e-2))
    return told, {name: value.detach().cpu() for name, value in engine.model.state_dict().items()}, engine


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_replayed_steps_are_launched_steps(moe: MoEConfig, recompute: str) -> None:
    device = torch.device("cuda")
    told, weights, _ = trained(moe, device, graph=False, recompute=recompute)
    found, replayed, engine = trained(moe, device, graph=True, recompute=recompute)
    assert engine.graphs is not None and len(engine.graphs.recorded) >= 2
    assert found == told
    assert same(replayed, weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("moe", CASES.values(), ids=CASES)
def test_a_micro_step_waits_for_nothing(moe: MoEConfig) -> None:
    device = torch.device("cuda")
    _, _, engine = trained(moe, device, graph=False)
    tokens = torch.randint(64, (ROWS, LENGTH), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.micro_step(tokens, tokens, StepContext(RandomKey.of("graph")))
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Unrecorded:
    """Runs what would be replayed."""

    def __init__(self, *_: object) -> None:
        self.kinds: set[tuple[int, ...]] = set()

    def run(self, kind: tuple[int, ...], micro_step: Any, *args: Any) -> Any:
        self.kinds.add(kind)
        return micro_step(*args)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["a limit", "quantile, schedule"])
def test_gradients_that_keep_their_memory_are_the_same(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bookkeeping around graphs, on any device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told, weights, _ = trained(CASES[name], device, graph=False, precision=precision)
    monkeypatch.setattr("moe_dist.engine.native.StepGraphs", Unrecorded)
    found, kept, engine = trained(CASES[name], device, graph=True, precision=precision)
    assert found == told
    assert same(kept, weights)
    phases = 2 if "schedule" in name else 1
    assert len(engine.graphs.kinds) == 2 * phases  # type: ignore[union-attr]


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cuda_graph=true needs a GPU, but this run is on cpu"):
        trained(MOE, torch.device("cpu"), graph=True)
