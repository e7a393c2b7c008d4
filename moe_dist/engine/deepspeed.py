"""DeepSpeed ZeRO under our layouts; all that this project knows of DeepSpeed is here and in deepspeed_*.py.

What DeepSpeed 0.19 needs to be told, and why:
- Experts at ep > 1 are marked `allreduce = False` with a group name: only then are they reduced over the edp group
  (summed there, divided by the full dp size), and not overwritten by rank 0's when it starts.
- Its groups for that name are taken from our mesh, so that both sides agree on who is an expert's replica.
- Stages 0 to 2 look at those marks only if there is a `MoE` module: a parameterless one stands beside the model.
- Stage 3 refuses such a module, but cuts a parameter over the group that it carries. That is made for its own expert
  parallelism, "AutoEP", whose experts it averages over dp and takes a norm of over ep: ours call themselves that.
- Stage 3 gathers a whole routed layer at once (a "leaf"): it calls its router and experts in ways that no hook on
  them sees, and experts without rows still get a gradient of zeros, so that every rank reduces.
- Stage 3 gathers sets of parameters, group after group in the order of their addresses, which differs between ranks:
  we sort them, because exchanges of two groups that ranks begin in different order can wait for each other.
- Stage 3 fetches a module's own parameters again when backward reaches its output, which it finds in tensors, tuples
  and dicts alone: our root returns none of these, so `micro_step` marks the loss in its name.
- Stage 3 fetches ahead, keeps and cuts groups of parameters by their size here, which differs between the ranks of dp
  where experts have different widths: there it must do neither.
- Its norm counts a parameter on every model-parallel rank only if `tensor_model_parallel` is set: set for parameters
  cut over tp and for experts, which differ between tp ranks, not for replicated ones.
- Stage 0 clips by a norm that averages ranks, wrong under ep: we clip there ourselves, by the true norm.
- ZeRO leaves a step out when its norm is not finite, and keeps its counters right: so discarding a step is giving it
  such a norm. It then says so in `overflow` alone, for the norm it reports can be an older one.
- What is frozen is in no optimizer group; it keeps that in the precision it computes in, so its fp32 values are ours
  (deepspeed_state.py). A marker without trained experts is refused, and not needed.
- Stage 3 reduces a leaf when the gradient of its input comes: where the embedding is frozen its output asks for a
  gradient all the same, or leaves before the first trained parameter would be reduced before they have any.
- It makes a bucket for gradients in full, and one more where they leave while backward goes on, 2 GB each unless told:
  ours has the size that the native engine's buckets have.
- The checkpoint is ours (`held`), because DeepSpeed's loses a foreign module's experts.
"""

import contextlib
import gc
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.attention.routed import RoutedSelfAttention
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.base import (
    Kind,
    Piece,
    RouterLoads,
    clip_by_global_norm,
    decay_groups,
    held_buffers,
)
from moe_dist.engine.deepspeed_comm import note_collectives
from moe_dist.engine.deepspeed_mesh import ModelParallelUnit, process_group
from moe_dist.engine.deepspeed_state import Specs, ZeroState, frozen_in_fp32
from moe_dist.engine.exchange import zero_bucket
from moe_dist.models.decoder import DecoderOutput, Want
from moe_dist.models.trainable import Trainable
from moe_dist.moe.experts import expert_widths
from moe_dist.moe.layer import MoE
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import logical_parameters, spec_of
from moe_dist.step import StepContext

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402  (reads the two settings above while it is imported)
import deepspeed.runtime.compiler as deepspeed_compiler  # noqa: E402
from deepspeed.moe.layer import MoE as DeepSpeedMoE  # noqa: E402
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import Init  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

deepspeed_logger.setLevel(logging.WARNING)
# Only inference uses this all-reduce over shared memory; compiling it takes a minute at the first start on CPU.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _import_muon_as_it_is() -> None:
    """Every engine imports an optimizer that is none of ours, and that asks for torch's compiler where it is imported:
    a quarter of what a small run takes to start."""
    compile_functions = deepspeed_compiler.compile
    deepspeed_compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        deepspeed_compiler.compile = compile_functions


_import_muon_as_it_is()

_LEAVES = (MoE, SwitchAttention, RoutedSelfAttention)


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
        specs: Specs = {name: (param, spec) for name, param, spec in logical_parameters(model)}
        self.micro, self.loads = 0, RouterLoads()
        _mark_parameters(specs, mesh)
        kept = frozen_in_fp32(specs, mesh, self.stage) if engine.precision != "fp32" else {}
        root: nn.Module = model
        if self.stage == 3:
            whole = [kind for kind in _LEAVES if any(isinstance(module, kind) for module in model.modules())]
            if whole:
                set_z3_leaf_modules(model, whole)
            model.embedding.register_forward_hook(_ask_for_gradient)
        elif any(spec.shard == "expert" and param.requires_grad for param, spec in specs.values()):
            root = _WithMarker(model, mesh)
        optimizer = torch.optim.AdamW(
            _param_groups(model, optim, mesh), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
        )
        even = mesh.ep.size == 1 or len(set(expert_widths(model.config.moe, model.config.d_ff))) <= 1
        config = _config(engine, micro_batch, accumulation, mesh, even)
        with contextlib.redirect_stdout(io.StringIO()), _older_is_no_garbage():  # it prints which extensions it built
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=root, optimizer=optimizer, config=config, mpu=ModelParallelUnit(mesh), dist_init_required=False
            )
        if self.engine.dp_world_size != mesh.layout.dp:
            raise RuntimeError(f"DeepSpeed took dp={self.engine.dp_world_size}, but the layout has dp={mesh.layout.dp}")
        note_collectives(mesh.trail)
        self.model, self.trained = model, [param for param, _ in specs.values() if param.requires_grad]
        if self.stage == 3:
            _gather_in_order([param for param, _ in specs.values()])
        self.state = ZeroState(self.stage, self.optimizer, specs, mesh, kept)

    def micro_step(self, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        self.mesh.trail.enter("forward")
        output = self.engine(tokens_BS, targets, step)
        self.mesh.trail.enter("backward")
        root: Any = self.model
        self.engine.backward(output.loss if self.stage < 3 else root.pre_bwd_fn.apply(output.loss))
        self.micro = (self.micro + 1) % self.accumulation
        if self.micro:
            self.engine.step()  # no boundary: DeepSpeed only counts
        return self.loads.take(output)

    def evaluate(
        self, tokens_BS: Tensor, targets: Tensor | None, step: StepContext, want: Want, **decoding: Any
    ) -> Tensor:
        self.mesh.trail.enter("evaluation")
        self.engine.eval()
        with torch.no_grad():
            out = self.engine(tokens_BS, targets, step, want, **decoding)
        self.engine.train()
        return out

    def update(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip_by_true_norm() if self.stage == 0 else self._not_finite_on_a_tp_rank()
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
            for param in self.trained:
                param.grad = None  # torch's optimizer passes over it
        else:
            for grad in self.state.reduced_gradients():
                grad.fill_(math.nan)
        self.engine.step()
        assert self.stage == 0 or self.optimizer.overflow, "ZeRO leaves a step out when its norm is not finite"
        self.loads.forget()

    def held(self, kind: Kind) -> Iterator[Piece]:
        yield from self.state.pieces(kind)
        if kind == "weight":
            yield from held_buffers(self.model, self.mesh)

    def restore(self, optimizer_step: int) -> None:
        self.state.restore(optimizer_step)

    def _not_finite_on_a_tp_rank(self) -> float | None:
        """Stages 1 to 3 reduce what is replicated over tp over dp alone, and count it in the norm on the first tp rank
        alone: when it is not finite on another, they would apply the step. A norm then, for all ranks; else None."""
        if self.mesh.tp.size == 1:
            return None
        norms = torch._foreach_norm(self.state.reduced_gradients())
        total = all_reduce(torch.stack(norms).double().sum(), self.mesh.world)
        return None if math.isfinite(total) else math.inf

    def _clip_by_true_norm(self) -> float:
        """Stage 0: gradients are whole and reduced after backward."""
        return clip_by_global_norm([param.grad for param in self.trained], self.trained, self.mesh, self.grad_clip)


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

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed would make groups here; `_mark_parameters` has handed it ours."""


def number_anew() -> None:
    """For a process that stands for one rank after another: DeepSpeed counts modules and parameters as long as it
    lives, and stage 3 compares their numbers between ranks."""
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep.size}"  # DeepSpeed reads the number out of it


@contextlib.contextmanager
def _older_is_no_garbage() -> Iterator[None]:
    """Garbage is looked for in what is made within: DeepSpeed does so dozens of times, to print how much memory is in
    use, and each look through all that was imported takes a tenth of a second."""
    ours = gc.get_freeze_count() == 0  # else somebody wants older objects left alone for longer
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _mark_parameters(specs: Specs, mesh: Mesh) -> None:
    experts = [param for param, spec in specs.values() if spec.shard == "expert"]
    if experts:
        name, replicas = _group_name(mesh), process_group(mesh.edp)
        deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = process_group(mesh.ep)
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = replicas
    for param in experts:
        param.allreduce, param.group_name = False, name
        # The same for stage 3, which looks at nothing else.
        param.ds_zero_placement_family, param.ds_zero_partition_group_name = "autoep_expert", name
        param.ds_zero_partition_process_group = replicas
    for param, spec in specs.values():
        if spec.shard != "replicated":
            param.tensor_model_parallel = True


def _ask_for_gradient(embedding: nn.Module, args: Any, rows_TD: Tensor) -> None:
    if torch.is_grad_enabled() and not rows_TD.requires_grad:
        rows_TD.requires_grad_()


def _gather_in_order(params: Sequence[nn.Parameter]) -> None:
    param: Any
    for param in params:
        gather = param.all_gather_coalesced
        param.all_gather_coalesced = lambda some, gather=gather, **how: gather(sorted(some, key=_zero_id), **how)


def _zero_id(param: Any) -> int:
    number: int = param.ds_id  # the same on all ranks
    return number


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


def _config(engine: EngineConfig, micro_batch: int, accumulation: int, mesh: Mesh, even: bool) -> dict[str, Any]:
    """even: every rank of dp has as many numbers as any other."""
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
            "reduce_bucket_size": zero_bucket(engine),
            "overlap_comm": engine.bucket_mib is not None,
            "stage3_param_persistence_threshold": 0,
        },
    }
    if not even:
        own_pace = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "sub_group_size": 2**62}
        config["zero_optimization"] |= own_pace
    if engine.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
