"""What distributed tests share: running several checks in one spawn, and a training run small enough for a test."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config, validate
from moe_dist.config.parse import parse_dict
from moe_dist.engine.base import Engine, Kind
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder, DecoderOutput
from moe_dist.models.freezing import freeze
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import logical_parameters
from moe_dist.plan.rows import Rows
from moe_dist.step import StepContext
from tests.dist.nodes import Network
from tests.dist.nursery import on_ranks

KEY = RandomKey.of("tests")
TINY: dict[str, Any] = {
    "model": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "moe": {"num_experts": 4, "d_ff": 48}},
    # A large eps keeps Adam from turning the rounding noise of a tiny gradient into a full step.
    "optim": {"lr": 1e-3, "eps": 1e-4, "schedule": "constant", "warmup_steps": 0},
    "train": {"steps": 100, "seq_len": 16, "global_batch": 8, "accumulation": 1},
}


def run_checks(ranks: int, checks: Sequence[Callable[..., None]], *args: Any, network: Network | None = None) -> None:
    """Every check, in order, on `ranks` processes, on the nodes of `network` if given. Checks are importable."""
    on_ranks(_checks, ranks, list(checks), args, network=network)


def _checks(checks: Sequence[Callable[..., None]], args: tuple[Any, ...]) -> None:
    for check in checks:
        try:
            check(*args)
        except Exception as error:
            raise AssertionError(f"{check.__name__} on rank {dist.get_rank()} of {dist.get_world_size()}") from error


def tiny_config(**changes: Any) -> Config:
    """TINY with changes: tiny_config(parallel__ep=2, model__moe__top_k=1)."""
    nested = {name: dict(section) for name, section in TINY.items()}
    nested["model"]["moe"] = dict(nested["model"]["moe"])
    for path, value in changes.items():
        *sections, key = path.split("__")
        home = nested
        for section in sections:
            home = home.setdefault(section, {})
        home[key] = value
    return parse_dict(nested, "test")


class TinyRun:
    """The engine of a config on this rank, fed with sequences that are a function of the step alone."""

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype = torch.float32) -> None:
        self.shape = validate(config, mesh.layout.world)
        config = replace(config, model=resolve_backends(config.model, config.parallel.expert_ranks))
        mesh = replace(mesh, sequence_parallel=config.parallel.sequence_parallel)
        self.config, self.mesh = config, mesh
        model = Decoder(config.model, mesh, config.train.seed).to(dtype)
        freeze(model, config.train.freeze)
        self.engine: Engine = make_engine(
            model, mesh, config.engine, config.optim, self.shape.micro_batch, self.shape.accumulation
        )

    def batch(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Each byte follows from the one before, most of the time, so that there is something to learn."""
        length, rows = self.shape.seq_len + 1, self.shape.micro_step_sequences
        first, noise = KEY.fold(step, micro, "first"), KEY.fold(step, micro, "noise")
        ids = (first.uniform(torch.arange(rows)) * 256).long()[:, None] + torch.arange(length) * 7
        ids = (ids + (noise.uniform(torch.arange(rows * length)).view(rows, length) * 1.2).long()) % 256
        mine = ids[self.mesh.dp.rank * self.shape.micro_batch : (self.mesh.dp.rank + 1) * self.shape.micro_batch]
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()

    def forward_backward(self, step: int) -> tuple[float, DecoderOutput]:
        """(mean loss over the world, the last micro-step's output)."""
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(self.shape.accumulation):
            output = self.engine.micro_step(*self.batch(step, micro), StepContext(KEY.fold(step, micro)))
            total += output.nll.double()
        total = all_reduce(total, self.mesh.dp) / self.mesh.layout.dp / self.shape.accumulation
        return float(total), output

    def train(self, first: int, last: int) -> list[float]:
        """Losses of steps [first, last)."""
        losses = []
        for step in range(first, last):
            losses.append(self.forward_backward(step)[0])
            self.engine.update(self.config.optim.lr)
        return losses


def rows_that_came(run: TinyRun, output: DecoderOutput) -> Rows:
    """To this rank in a micro-step without a limit: the mean over layers, but for the fullest expert that of the layer
    whose backward pass finds most there. Over edp the mean of its ranks."""
    layout, moe = run.mesh.layout, run.config.model.moe
    held, asked = moe.num_experts // layout.ep, run.shape.micro_batch * run.shape.seq_len * moe.top_k // layout.tp
    first = run.mesh.ep.rank * held
    kept_Le = torch.stack([stats.kept_E for stats in output.stats])[:, first : first + held] / layout.edp
    fullest_e = kept_Le[-1 if run.config.model.recompute != "block" else 0]
    return Rows(asked, asked, round(float(kept_Le.sum(1).mean())), round(float(fullest_e.amax())))


def logical(engine: Engine, kind: Kind) -> dict[str, Tensor]:
    """Every logical parameter whole, on every rank; each element must have exactly one owner. Of what is frozen the
    weight alone."""
    parameters = logical_parameters(engine.model)
    shapes = {name: spec.logical_shape for name, p, spec in parameters if kind == "weight" or p.requires_grad}
    if kind == "weight":
        shapes |= {name: tuple(buffer.shape) for name, buffer in engine.model.named_buffers()}
    sizes = [prod(shape) for shape in shapes.values()]
    values, owners = torch.zeros(2, sum(sizes), dtype=torch.float64)
    starts = dict(zip(shapes, accumulate(sizes, initial=0), strict=False))
    for piece in engine.held(kind):
        assert piece.logical_shape == shapes[piece.name]
        start, owned = piece.owned_part()
        first = starts[piece.name] + start
        values[first : first + owned.numel()] += owned.detach().double()
        owners[first : first + owned.numel()] += 1
    all_reduce(values, engine.mesh.world)
    all_reduce(owners, engine.mesh.world)
    parts = zip(shapes.items(), values.split(sizes), owners.split(sizes), strict=True)
    whole = {}
    for (name, shape), value, owner in parts:
        assert owner.eq(1).all(), f"{kind}/{name}: {int(owner.ne(1).sum())} elements have not exactly one owner"
        whole[name] = value.view(shape)
    return whole


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal names and tensors."""
    assert sorted(actual) == sorted(expected), sorted(set(actual) ^ set(expected))
    for name, value in expected.items():
        describe = partial("{0}: {1}".format, name)
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=describe)


def raised(kind: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    """The message of the exception that call(*args) must raise."""
    try:
        call(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} raised no {kind.__name__}")


def forget_process_group() -> None:
    """After an error in this process, which would have ended a rank."""
    with suppress(Exception):
        dist.destroy_process_group()
