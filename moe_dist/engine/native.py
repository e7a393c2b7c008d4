"""The oracle: plain torch, gradients all-reduced by group (exchange.py), one global norm, AdamW.

Nothing is sharded beyond what tp and ep cut. In bf16 the masters, the accumulated gradients and the moments are fp32.
With `cuda_graph`, micro-steps are replayed as graphs (graphs.py), and accumulated gradients keep their memory.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.adamw import grad_of, make_adamw
from moe_dist.engine.base import (
    Kind,
    Piece,
    RouterLoads,
    clip_by_global_norm,
    compute_dtype,
    decay_groups,
    held_buffers,
)
from moe_dist.engine.exchange import GradientExchange
from moe_dist.engine.graphs import StepGraphs
from moe_dist.engine.shares import copies, shares
from moe_dist.models.decoder import DecoderOutput, Want
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import logical_parameters
from moe_dist.step import StepContext


class NativeEngine:
    def __init__(
        self, model: Trainable, mesh: Mesh, engine: EngineConfig, optim: OptimConfig, accumulation: int
    ) -> None:
        self.model, self.mesh, self.grad_clip, self.accumulation = model, mesh, engine.grad_clip, accumulation
        self.micro, self.loads = 0, RouterLoads()
        params = list(model.parameters())
        self.graphs = StepGraphs(mesh, params[0].device) if engine.cuda_graph else None
        self.low_precision = engine.precision == "bf16"
        if self.low_precision:
            masters = [p.detach().clone() for p in params]
            for p in params:
                p.data = p.data.to(compute_dtype(engine.precision))
        else:
            masters = [p.detach() for p in params]
        # Masters share memory with fp32 parameters; their .grad holds the accumulated, then the reduced gradient.
        self.masters = dict(zip(params, masters, strict=True))
        self.trained = {param: master for param, master in self.masters.items() if param.requires_grad}
        self.gradients = GradientExchange(self.trained, mesh, None if engine.cuda_graph else engine.bucket_mib)
        groups = [([self.masters[p] for p in group], factor) for _, factor, group in decay_groups(model) if group]
        self.optimizer = make_adamw(groups, optim, params[0].device.type)

    def micro_step(self, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        if self.graphs is None:
            output = self._micro_step(tokens_BS, targets, step)
        else:
            self.mesh.trail.enter("forward and backward")
            kind = (self.micro, *(moe.schedule_phase(step.step) for moe in self.model.config.moe_sections))
            output = self.graphs.run(kind, self._micro_step, tokens_BS, targets, step)
        self.micro = (self.micro + 1) % self.accumulation
        return self.loads.take(output)

    def _micro_step(self, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        self.mesh.trail.enter("forward")
        output: DecoderOutput = self.model(tokens_BS, targets, step)
        self.mesh.trail.enter("backward")
        with self.gradients.of_micro_step(self.micro == 0, self.micro + 1 == self.accumulation):
            (output.loss / self.accumulation).backward()
        return output

    @torch.no_grad()
    def evaluate(
        self, tokens_BS: Tensor, targets: Tensor | None, step: StepContext, want: Want, **decoding: Any
    ) -> Tensor:
        self.mesh.trail.enter("evaluation")
        return self.model(tokens_BS, targets, step, want, **decoding)

    @torch.no_grad()
    def update(self, lr: float) -> float:
        grads = [grad_of(master) for master in self.trained.values()]
        norm = clip_by_global_norm(grads, list(self.trained), self.mesh, self.grad_clip)
        if not math.isfinite(norm):
            self.discard()
            return norm
        self.optimizer.step(lr)
        self._clear()
        self._refresh(self.trained)
        self.loads.settle(self.model)
        return norm

    def discard(self) -> None:
        self._clear()
        self.loads.forget()

    def _clear(self) -> None:
        if self.graphs is None:  # else the first micro-step of a step writes over them
            self.gradients.clear()

    def held(self, kind: Kind) -> Iterator[Piece]:
        parameters = [each for each in logical_parameters(self.model) if kind == "weight" or each[1].requires_grad]
        owned = shares([(param.numel(), copies(spec, self.mesh)) for _, param, spec in parameters])
        for (name, param, spec), mine in zip(parameters, owned, strict=True):
            master = self.masters[param]
            if kind == "weight":
                values = master
            elif kind == "grad":
                values = grad_of(master)
            else:
                values = getattr(self.optimizer.moments(master), kind)
            yield Piece(name, spec.logical_shape, spec.flat_start, values.view(-1), mine)
        if kind == "weight":
            yield from held_buffers(self.model, self.mesh)

    def restore(self, optimizer_step: int) -> None:
        self.optimizer.set_step(optimizer_step)
        self._refresh(self.masters)

    @torch.no_grad()
    def _refresh(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        if self.low_precision:
            for param, master in masters.items():
                param.copy_(master)
