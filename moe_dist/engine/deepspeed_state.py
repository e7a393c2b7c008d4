"""Where DeepSpeed's optimizers keep weights, gradients and moments, as pieces of logical parameters.

Stage 0 keeps parameters whole. Stages 1 and 2 lay a group's parameters end to end and cut that. Stage 3 cuts every
parameter into equal pieces, the last one padded. What is cut, is cut over the ranks that would hold the same: edp for
experts at ep > 1, dp for all others. Frozen parameters lie whole below stage 3. Names of attributes are those of
DeepSpeed 0.19.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.engine.base import Kind, Piece
from moe_dist.engine.shares import copies, shares
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec

# Any: DeepSpeed hangs attributes of its own on parameters.
Specs = dict[str, tuple[Any, ParamSpec]]
_Held = Iterator[tuple[str, int, Tensor, Group]]
"""(name, first element in the logical parameter, values, ranks that hold the same)."""


@dataclass(frozen=True)
class ZeroState:
    """State of one engine. optimizer: what deepspeed.initialize returned; stage 0 keeps ours. kept: of frozen_in_fp32,
    where DeepSpeed computes in less."""

    stage: int
    optimizer: Any
    specs: Specs
    mesh: Mesh
    kept: Mapping[str, Tensor]

    def pieces(self, kind: Kind) -> Iterator[Piece]:
        """This rank's pieces of every parameter, as views wherever they can be written to."""
        held = list({0: self._whole, 1: self._ranges, 2: self._ranges, 3: self._equal_cuts}[self.stage](kind))
        held += self._frozen() if kind == "weight" else []
        owned = shares([(values.numel(), ranks) for _, _, values, ranks in held])
        for (name, start, values, _), mine in zip(held, owned, strict=True):
            yield Piece(name, self.specs[name][1].logical_shape, start, values, mine)

    def restore(self, optimizer_step: int) -> None:
        """Makes the compute weights follow the masters, and sets Adam's step."""
        zero = self.optimizer
        base = zero if self.stage == 0 else zero.optimizer
        # Stage 3 keeps its optimizer's groups empty, but for the moment of a step.
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else None
        for param in flats or [param for group in base.param_groups for param in group["params"]]:
            _adam(base, param)["step"].fill_(optimizer_step)
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for low, flat in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
                low.data.copy_(flat.data)
        for name, values in self.kept.items():
            self._in_use(self.specs[name][0]).narrow(0, 0, values.numel()).copy_(values)

    def reduced_gradients(self) -> list[Tensor]:
        """Stages 1 to 3: what this rank holds of the gradients, as the step will read them."""
        zero = self.optimizer
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):
            return list(zero.fp32_groups_gradient_flat_partition)
        return [grad for group in zero.averaged_gradients.values() for grad in group]

    def _frozen(self) -> _Held:
        for name, (param, spec) in self.specs.items():
            if param.requires_grad:
                continue
            first, held = _cut(param, spec, self.mesh, self.stage)
            if held > 0:
                values = self.kept[name] if name in self.kept else self._in_use(param).narrow(0, 0, held)
                ranks = copies(spec, self.mesh) if self.stage < 3 else self._copies(spec)
                yield name, spec.flat_start + first, values, ranks

    def _in_use(self, param: Any) -> Tensor:
        """What this rank computes with, or its part of it: 1-D."""
        values: Tensor = param.data.view(-1) if self.stage < 3 else param.ds_tensor.data
        return values

    def _trained(self) -> Iterator[tuple[str, Any, ParamSpec]]:
        return ((name, param, spec) for name, (param, spec) in self.specs.items() if param.requires_grad)

    def _whole(self, kind: Kind) -> _Held:
        for name, param, spec in self._trained():
            values = {"weight": lambda p: p.data, "grad": lambda p: p.grad}.get(kind)
            held = values(param) if values else _adam(self.optimizer, param)[kind]
            yield name, spec.flat_start, held.view(-1), copies(spec, self.mesh)

    def _ranges(self, kind: Kind) -> _Held:
        zero = self.optimizer
        bf16_wrapper = hasattr(zero, "fp32_groups_flat_partition")
        low, flats = (
            (zero.bf16_groups, zero.fp32_groups_flat_partition)
            if bf16_wrapper
            else (zero.bit16_groups, zero.single_partition_of_fp32_groups)
        )
        names = {param: name for name, (param, _) in self.specs.items()}
        for index, (params, flat) in enumerate(zip(low, flats, strict=True)):
            if kind == "weight":
                buffer = flat.data
            elif kind != "grad":
                buffer = _adam(zero.optimizer, flat)[kind]
            elif bf16_wrapper:
                buffer = zero.fp32_groups_gradient_flat_partition[index]
            else:
                buffer = torch.cat([grad.flatten() for grad in zero.averaged_gradients[index]])
            for param in params:
                if param._hp_mapping is None:
                    continue  # lies in other ranks' partitions
                here, there = param._hp_mapping.get_hp_fragment_address(), param._hp_mapping.lp_fragment_address
                spec = self.specs[names[param]][1]
                values = buffer.narrow(0, here.start, here.numel)
                yield names[param], spec.flat_start + there.start, values, self._copies(spec)

    def _equal_cuts(self, kind: Kind) -> _Held:
        zero = self.optimizer
        for name, param, spec in self._trained():
            first, held = _cut(param, spec, self.mesh, self.stage)
            if held <= 0:
                continue  # padding alone
            group, offset, numel = zero.grad_position[zero.get_param_id(param)]
            flat = zero.fp32_partitioned_groups_flat[group]
            if kind == "grad":
                values = zero.get_local_fp32_grad_for_param(param)
            elif kind == "weight":
                values = flat.data.narrow(0, offset, numel)
            else:
                values = _adam(zero.optimizer, flat)[kind].narrow(0, offset, numel)
            yield name, spec.flat_start + first, values.view(-1).narrow(0, 0, held), self._copies(spec)

    def _copies(self, spec: ParamSpec) -> Group:
        """A cut piece is held once by dp or edp; the tp ranks hold the same of a replicated parameter."""
        return self.mesh.tp if spec.shard == "replicated" else Group()


def partition_group(spec: ParamSpec, mesh: Mesh) -> Group:
    """The ranks that hold the same part of the logical parameter, over which ZeRO cuts it."""
    return mesh.edp if spec.shard == "expert" else mesh.dp


def frozen_in_fp32(specs: Specs, mesh: Mesh, stage: int) -> dict[str, Tensor]:
    """Copies of what this rank holds of frozen parameters, before DeepSpeed takes the model and rounds them."""
    kept = {}
    for name, (param, spec) in specs.items():
        first, held = _cut(param, spec, mesh, stage)
        if not param.requires_grad and held > 0:
            kept[name] = param.data.view(-1).narrow(0, first, held).clone()
    return kept


def _cut(param: Any, spec: ParamSpec, mesh: Mesh, stage: int) -> tuple[int, int]:
    """(first element, elements) of a parameter of this rank that lie here; none where there is padding alone."""
    numel = getattr(param, "ds_numel", param.numel())
    if stage < 3:
        return 0, numel
    ranks = partition_group(spec, mesh)
    size = -(-numel // ranks.size)
    first = ranks.rank * size
    return first, min(size, numel - first)


def _adam(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one tensor, made of zeros before its first step."""
    state = optimizer.state[param]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param.data), torch.zeros_like(param.data)
    return state
