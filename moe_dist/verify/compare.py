"""Training one case, as the single-process reference or under a layout beside it.

On a GPU the backends are those that a run there would have, and products in fp32 are whole (no TF32), so that the same
tolerances hold as on CPU.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from moe_dist.config import Config, validate
from moe_dist.config.model import ModelConfig
from moe_dist.engine.base import Engine
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.models.freezing import freeze
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.step import StepContext
from moe_dist.train.schedule import learning_rate
from moe_dist.verify.cases import LayoutCase, Options, Setting, case_config
from moe_dist.verify.witness import Comparer, Differences, Recorder, Tape

Meshes = dict[tuple[int, int, int, int | None], Mesh]

_KEY = RandomKey.of("verify")


@dataclass
class Reference:
    """The single process, step by step."""

    tape: Tape = field(default_factory=Tape)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Largest differences of one layout over all steps: loss absolute, gradients and norm relative."""

    loss: float
    grad: float
    worst_parameter: str
    norm: float
    near_ties: int
    routed: int
    dropped: int

    def agrees(self, options: Options) -> bool:
        return (
            self.loss <= options.loss_tolerance
            and self.grad <= options.grad_tolerance
            and self.norm <= options.norm_tolerance
            and self.routed == self.dropped == 0
        )


def train_reference(setting: Setting, options: Options, device: torch.device, world: int = 1) -> Reference:
    """Train in this process alone and keep everything that layouts are compared with. Where a loss is taken by rank
    (balance local), the process takes it for `world` ranks."""
    run = _Run(case_config(setting, None, options.steps), single_process_mesh(), device, parts=world)
    reference = Reference()
    for step in range(options.steps):
        loss = run.forward_backward(step, lambda micro, step=step: Recorder(reference.tape, step, micro))
        reference.losses.append(loss)
        reference.grads.append({piece.name: piece.values.cpu().clone() for piece in run.engine.held("grad")})
        reference.norms.append(run.update(step))
    return reference


def compare_layout(
    setting: Setting, layout: LayoutCase, reference: Reference, options: Options, device: torch.device, meshes: Meshes
) -> Report:
    """Train under `layout` on all ranks beside the reference; the same Report on every rank. `meshes` keeps process
    groups from case to case.

    Raises ValueError when the layout does not fit the ranks.
    """
    config = case_config(setting, layout, options.steps)
    validate(config, torch.distributed.get_world_size())
    sizes = (config.parallel.ep, config.parallel.tp, config.parallel.etp, config.parallel.node_size)
    if sizes not in meshes:
        meshes[sizes] = create_mesh(*sizes)
    mesh = replace(meshes[sizes], sequence_parallel=config.parallel.sequence_parallel)
    run, found = _Run(config, mesh, device), Differences()
    top_k, tie = config.model.moe.top_k, options.tie_tolerance
    loss_off, norm_off, grad_off, worst = 0.0, 0.0, 0.0, ""
    for step in range(options.steps):
        loss = run.forward_backward(
            step, lambda micro, step=step: Comparer(reference.tape, step, micro, mesh.rank, top_k, tie, found)
        )
        loss_off = _worse(loss_off, abs(loss - reference.losses[step]))
        off, name = _gradient_difference(run.engine, reference.grads[step], mesh, device)
        if _worse(grad_off, off) is off:
            grad_off, worst = off, name
        norm_off = _worse(norm_off, abs(run.update(step) / reference.norms[step] - 1))
    counts = torch.tensor([found.near_ties, found.routed, found.dropped], device=device)
    near_ties, routed, dropped = all_reduce(counts, mesh.world).tolist()
    return Report(loss_off, grad_off, worst, norm_off, near_ties, routed, dropped)


def _worse(one: float, other: float) -> float:
    """The larger; not a number is worse than any number."""
    return one if other <= one or math.isnan(one) else other


def is_wide(model: ModelConfig) -> bool:
    """Compared in float64: see `Setting.wide`."""
    return model.attention.kind == "routed"


def backends_of(model: ModelConfig, expert_ranks: int, device_type: str) -> ModelConfig:
    """The backends of a run on that device. float64 has none of its own on a GPU: neither torch's grouped_mm nor the
    Triton kernels take it."""
    if is_wide(model) and device_type != "cpu":
        experts: Literal["loop", "bmm"] = "loop" if model.moe.experts == "loop" else "bmm"
        model = replace(model, kernels="torch", moe=replace(model.moe, experts=experts))
    return resolve_backends(model, expert_ranks, device_type)


class _Run:
    """A tiny training run whose sequences are a function of the step alone."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, parts: int = 1) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        model_config = backends_of(config.model, config.parallel.expert_ranks, device.type)
        self.config = replace(config, model=model_config)
        self.mesh, self.device, self.parts = mesh, device, parts
        self.shape = validate(config, mesh.layout.world)
        model = Decoder(model_config, mesh, config.train.seed)
        model = model.to(device, torch.float64 if is_wide(model_config) else None)
        freeze(model, config.train.freeze)
        self.engine: Engine = make_engine(
            model, mesh, config.engine, config.optim, self.shape.micro_batch, self.shape.accumulation
        )

    def forward_backward(self, step: int, witness_of) -> float:  # type: ignore[no-untyped-def]
        """All micro-steps of a step; the mean loss over them and over dp."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in range(self.shape.accumulation):
            tokens_BS, targets_BS = self._batch(step, micro)
            context = StepContext(_KEY.fold(step, micro), witness=witness_of(micro), step=step, parts=self.parts)
            total += self.engine.micro_step(tokens_BS, targets_BS, context).nll.double()
        return float(all_reduce(total, self.mesh.dp)) / self.shape.accumulation / self.mesh.layout.dp

    def update(self, step: int) -> float:
        return self.engine.update(learning_rate(step, self.config.train.steps, self.config.optim))

    def _batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Skewed random tokens, so that experts fill unevenly; this rank's rows of the micro-step."""
        shape, length = self.shape, self.shape.seq_len + 1
        index = torch.arange(shape.micro_step_sequences * length)
        vocab = self.config.model.vocab_size
        ids = (_KEY.fold("data", step, micro).uniform(index).square() * vocab).long().view(-1, length)
        mine = ids[self.mesh.dp.rank * shape.micro_batch : (self.mesh.dp.rank + 1) * shape.micro_batch].to(self.device)
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def _gradient_difference(
    engine: Engine, reference: dict[str, Tensor], mesh: Mesh, device: torch.device
) -> tuple[float, str]:
    """Largest ||g - ref|| / ||ref|| over logical parameters, and which one it is."""
    squares: dict[str, float] = defaultdict(float)
    for piece in engine.held("grad"):
        start, values = piece.owned_part()
        expected = reference[piece.name][start : start + values.numel()].to(device)
        squares[piece.name] += float((values.double() - expected.double()).square().sum())
    names = sorted(reference)
    difference = all_reduce(
        torch.tensor([squares[name] for name in names], dtype=torch.float64, device=device), mesh.world
    )
    size = torch.tensor([float(reference[name].double().square().sum()) for name in names], dtype=torch.float64)
    relative = (difference.cpu() / size.clamp(min=1e-30)).sqrt()
    worst = int(relative.argmax())
    return float(relative[worst]), names[worst]
