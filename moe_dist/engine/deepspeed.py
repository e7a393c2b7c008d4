"""DeepSpeed ZeRO under our layers; all that this project knows of DeepSpeed is in this file.

What DeepSpeed 0.19 needs to be told, and why:
- Experts at ep > 1 are marked `allreduce = False` with a group name, and a parameterless `MoE` module stands beside
  the model: only then are expert gradients reduced over the edp group: summed there, divided by the full dp size.
- Its groups for that name are taken from our mesh, so that both sides agree on who is an expert's replica.
- Its norm counts a parameter on every model-parallel rank only if `tensor_model_parallel` is set: set for parameters
  cut over tp and for experts, which differ between tp ranks, not for replicated ones.
- Stage 0 clips by a norm that averages ranks, wrong under ep: we clip there ourselves, by the true norm.
- Stage 3 partitions over the full dp group, which is wrong for experts at ep > 1: refused by config validation.
- ZeRO leaves a step out when its norm is not finite, and keeps its counters right: so discarding a step is giving it
  such a norm. It then says so in `overflow` alone, for the norm it reports can be an older one.
- The checkpoint is ours (`held`), because DeepSpeed's loses a foreign module's experts.
"""

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.base import (
    Kind,
    Piece,
    RouterLoads,
    clip_by_global_norm,
    decay_groups,
    held_buffers,
    owns_replica,
)
from moe_dist.models.decoder import DecoderOutput, Want
from moe_dist.models.trainable import Trainable
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import StepContext
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, logical_parameters, spec_of

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402  (reads the two settings above while it is imported)
from deepspeed.moe.layer import MoE as DeepSpeedMoE  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

deepspeed_logger.setLevel(logging.WARNING)
# Only inference uses this all-reduce over shared memory; compiling it takes a minute at the first start on CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """ZeRO stages 0 to 3 over any ep x tp that the config rules admit."""

    def __init__(
        self,
        model: Trainable,
        mesh: Mesh,
        engine: EngineConfig,
        optim: OptimConfig,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.mesh, self.stage, self.grad_clip, self.accumulation = (
            mesh,
            engine.zero_stage,
            engine.grad_clip,
            accumulation,
        )
        # Any: DeepSpeed hangs attributes of its own on parameters.
        self.specs: dict[str, tuple[Any, ParamSpec]] = {
            n: (param, spec) for n, param, spec in logical_parameters(model)
        }
        self.micro, self.loads = 0, RouterLoads()
        _mark_parameters(model, mesh)
        root: nn.Module = model
        if any(spec.shard == "expert" for _, spec in self.specs.values()):
            root = _WithMarker(model, mesh)
        elif self.stage == 3:
            set_z3_leaf_modules(model, [MoE])
        optimizer = torch.optim.AdamW(
            _param_groups(model, optim, mesh), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
        )
        config = _config(engine, micro_batch, accumulation, mesh)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which extensions it built
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=root, optimizer=optimizer, config=config, mpu=_ModelParallelUnit(mesh), dist_init_required=False
            )
        if self.engine.dp_world_size != mesh.layout.dp:
            raise RuntimeError(f"DeepSpeed took dp={self.engine.dp_world_size}, but the layout has dp={mesh.layout.dp}")
        self.model = model

    def micro_step(self, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        self.mesh.trail.enter("forward")
        output = self.engine(tokens_BS, targets, step)
        self.mesh.trail.enter("backward")
        self.engine.backward(output.loss)
        self.micro = (self.micro + 1) % self.accumulation
        if self.micro:
            self.engine.step()  # no boundary: DeepSpeed only counts
        self.loads.add(output)
        return output

    def evaluate(
        self, tokens_BS: Tensor, targets: Tensor | None, step: StepContext, want: Want, **decoding: Any
    ) -> Tensor:
        self.engine.eval()
        with torch.no_grad():
            out = self.engine(tokens_BS, targets, step, want, **decoding)
        self.engine.train()
        return out

    def update(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip_by_true_norm() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.discard()
            return norm
        self.engine.step()
        if self.stage > 0 and self.optimizer.overflow:
            self.loads.forget()
            return math.inf
        self.loads.settle(self.model)
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    def discard(self) -> None:
        if self.stage == 0:
            for param, _ in self.specs.values():
                param.grad = None  # torch's optimizer passes over it
        else:
            for grad in self._reduced_gradients():
                grad.fill_(math.nan)
        self.engine.step()
        assert self.stage == 0 or self.optimizer.overflow, "ZeRO leaves a step out when its norm is not finite"
        self.loads.forget()

    def _reduced_gradients(self) -> list[Tensor]:
        """Stages 1 to 3: what this rank holds of the gradients, as the step will read them."""
        zero = self.optimizer
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):
            return list(zero.fp32_groups_gradient_flat_partition)
        return [grad for group in zero.averaged_gradients.values() for grad in group]

    def held(self, kind: Kind) -> Iterator[Piece]:
        pieces = {0: self._whole, 1: self._partitions, 2: self._partitions, 3: self._zero3}[self.stage](kind)
        for name, start, values, owned in pieces:
            yield Piece(name, self.specs[name][1].logical_shape, start, values, owned)
        if kind == "weight":
            yield from held_buffers(self.model, self.mesh)

    def restore(self, optimizer_step: int) -> None:
        base = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        # Stage 3 keeps its optimizer's groups empty, but for the moment of a step.
        flats = self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else None
        for param in flats or [param for group in base.param_groups for param in group["params"]]:
            self._state(base, param)["step"].fill_(optimizer_step)
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            for flat, partition in zip(
                self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                flat.data.copy_(partition.data)

    def _clip_by_true_norm(self) -> float:
        """Stage 0: gradients are whole and reduced after backward."""
        params = [param for param, _ in self.specs.values()]
        return clip_by_global_norm([param.grad for param in params], params, self.mesh, self.grad_clip)

    def _whole(self, kind: Kind) -> Iterator[tuple[str, int, Tensor, bool]]:
        for name, (param, spec) in self.specs.items():
            values = {"weight": lambda p: p.data, "grad": lambda p: p.grad}.get(kind)
            held = values(param) if values else self._state(self.optimizer, param)[kind]
            yield name, spec.flat_start, held.view(-1), owns_replica(param, self.mesh)

    def _partitions(self, kind: Kind) -> Iterator[tuple[str, int, Tensor, bool]]:
        """Stages 1 and 2: each group's parameters lie end to end in a flat buffer, cut over its data-parallel group."""
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
                buffer = self._state(zero.optimizer, flat)[kind]
            elif bf16_wrapper:
                buffer = zero.fp32_groups_gradient_flat_partition[index]
            else:
                buffer = torch.cat([grad.flatten() for grad in zero.averaged_gradients[index]])
            for param in params:
                if param._hp_mapping is None:
                    continue  # lies in other ranks' partitions
                here, there = param._hp_mapping.get_hp_fragment_address(), param._hp_mapping.lp_fragment_address
                spec: ParamSpec = spec_of(param)
                owned = spec.shard != "replicated" or self.mesh.tp.rank == 0
                yield names[param], spec.flat_start + there.start, buffer.narrow(0, here.start, here.numel), owned

    def _zero3(self, kind: Kind) -> Iterator[tuple[str, int, Tensor, bool]]:
        """Stage 3: every parameter is cut into dp equal pieces, the last one padded."""
        zero, rank = self.optimizer, self.mesh.dp.rank
        for name, (param, spec) in self.specs.items():
            size = param.ds_tensor.ds_numel
            first = rank * size
            held = max(0, min(size, param.ds_numel - first))
            if kind == "grad":
                values = zero.get_local_fp32_grad_for_param(param)
            else:
                values = self._zero3_view(param, kind)
            owned = spec.shard != "replicated" or self.mesh.tp.rank == 0
            if held:
                yield name, spec.flat_start + first, values.view(-1).narrow(0, 0, held), owned

    def _zero3_view(self, param: nn.Parameter, kind: Kind) -> Tensor:
        zero = self.optimizer
        group, offset, numel = zero.grad_position[zero.get_param_id(param)]
        flat = zero.fp32_partitioned_groups_flat[group]
        buffer = flat.data if kind == "weight" else self._state(zero.optimizer, flat)[kind]
        return buffer.narrow(0, offset, numel)

    @staticmethod
    def _state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
        state = optimizer.state[param]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param.data), torch.zeros_like(param.data)
        return state


class _WithMarker(nn.Module):
    """The model with a sibling that makes DeepSpeed see expert parameters. It holds no parameters of its own."""

    def __init__(self, model: Trainable, mesh: Mesh) -> None:
        super().__init__()
        self.model, self.marker = model, _Marker(model.config.moe.num_experts, mesh)

    def forward(self, *args: Any, **kwargs: Any) -> DecoderOutput:
        return self.model(*args, **kwargs)


class _Marker(DeepSpeedMoE):
    def __init__(self, num_experts: int, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.num_local_experts = num_experts, num_experts // mesh.ep.size
        self.ep_size, self.expert_group_name = mesh.ep.size, _group_name(mesh)
        self.groups = (_process_group(mesh.ep), _process_group(mesh.edp))

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed: hands it our groups under the name that expert parameters carry."""
        name = self.expert_group_name
        deepspeed_groups._EXPERT_PARALLEL_GROUP[name], deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = self.groups


class _ModelParallelUnit:
    """Our mesh in the words of Megatron's `mpu`, as DeepSpeed asks for it.

    Given also at tp = 1: DeepSpeed keeps the last one it saw in a global.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.tp, self.dp = mesh.tp, mesh.dp
        self.tp_group, self.dp_group = _process_group(mesh.tp), _process_group(mesh.dp)

    def get_model_parallel_rank(self) -> int:
        return self.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.tp.ranks[0]


def _process_group(group: Group) -> dist.ProcessGroup:
    """DeepSpeed wants a real group even for one rank; only that rank has to make it."""
    if group.process_group is not None:
        return group.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep.size}"  # DeepSpeed reads the number out of it


def _mark_parameters(model: Trainable, mesh: Mesh) -> None:
    param: Any
    for _, param, spec in logical_parameters(model):
        if spec.shard == "expert":
            param.allreduce, param.group_name = False, _group_name(mesh)
        if spec.shard != "replicated":
            param.tensor_model_parallel = True


def _param_groups(model: Trainable, optim: OptimConfig, mesh: Mesh) -> list[dict[str, Any]]:
    """Decay groups, split into dense and expert ones: DeepSpeed reduces a whole group over one process group."""
    out: list[dict[str, Any]] = []
    for name, factor, params in decay_groups(model):
        decay = optim.weight_decay * factor
        dense = [p for p in params if spec_of(p).shard != "expert"]
        expert = [p for p in params if spec_of(p).shard == "expert"]
        if dense:
            out.append({"params": dense, "weight_decay": decay, "name": name})
        if expert:
            out.append({"params": expert, "weight_decay": decay, "name": _group_name(mesh), "moe": True})
    return out


def _config(engine: EngineConfig, micro_batch: int, accumulation: int, mesh: Mesh) -> dict[str, Any]:
    clip = 0.0 if engine.zero_stage == 0 else engine.grad_clip or 0.0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * mesh.layout.dp,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,
        },
    }
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
