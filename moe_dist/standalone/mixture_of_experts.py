"""`MixtureOfExperts`: the MoE layer on its own, for models that are not ours.

Legend: B batch, S sequence, T tokens, D d_model, E experts.
"""

from dataclasses import fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.config.parse import parse_as
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.schema import ParallelConfig
from moe_dist.kernels.activation import gated
from moe_dist.kernels.random import dropout_by_index
from moe_dist.models.backends import resolve_experts, resolve_kernels
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import Mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.base import KeepsStep, Layer, Loads, WithAuxLoss, device_of, drawn_seed, refuse_unknown
from moe_dist.standalone.one_operation import as_operation, autocast_dtype, handle_of
from moe_dist.step import StepContext
from moe_dist.surgery.layers import add_experts, close_experts, merge_experts, open_experts, remove_experts

Activation = Literal["swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu", "gelu_tanh"]


class MixtureOfExperts(KeepsStep, Layer):
    """y = dropout(sum over the top_k experts i of p_i(x) E_i(x)), E_i(x) = act(x W_up) W_out.

    d_ff: hidden width of one expert. expert_capacity_factor, a configuration's capacity_factor: in training an expert
    takes at most ceil(factor * top_k * tokens / num_experts) tokens, the others add nothing; None is dropless.
    Evaluation drops nothing unless eval_capacity_factor is given (with router=expert_choice, experts choose there too).
    device: where the layer starts, and for which kernels are chosen; None is torch's default device. activation: gelu,
    as in the usual feed-forward; those with glu have a third matrix. seed: of initial weights and of everything random;
    None draws one from torch's generator, so that layers differ. mesh: process groups to cut the experts over; the
    input is then this rank's tokens, equally many on every rank, and every rank must call. options: any other field of
    MoEConfig, such as router, expert_bias, drop_policy, balance_loss_coef.

    Random numbers (dropout, jitter, noise, random dropping) are a function of (seed, step, global token index), and
    without a mesh of the rank of torch.distributed too. `step` counts forward passes in training; seed and step are
    part of the state dict. A pass that torch.utils.checkpoint runs again is the same pass, and counts once. A graph of
    torch.compile has the layer as one operation, which runs as it is. Inside DistributedDataParallel with a mesh, call
    standalone.ddp.prepare_for_ddp first. docs/how-to/library.md shows the layer under all of these.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 8,
        top_k: int = 2,
        dropout: float = 0.1,
        expert_capacity_factor: float | None = 1.25,
        *,
        activation: Activation = "gelu",
        seed: int | None = None,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        given, mesh = mesh, mesh or single_process_mesh()
        super().__init__(drawn_seed(seed, mesh.world.size), given)
        if "capacity_factor" in options:
            raise ValueError("capacity_factor is called expert_capacity_factor here: give that one")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is outside 0 <= dropout < 1")
        device = device_of(device)
        options |= dict(num_experts=num_experts, top_k=top_k, capacity_factor=expert_capacity_factor)
        moe = _checked(options, d_model, d_ff, activation, mesh, device.type)
        kernels = resolve_kernels("auto", device.type)
        self.d_model, self.dropout = d_model, dropout
        self.dp = mesh.dp
        with device:
            self.moe = MoE(moe, d_model, d_ff, activation, layer=0, mesh=mesh, kernels=kernels)
        self.loads = Loads(given)
        self._handle = handle_of(self)
        initialize(self, self.seed)
        self.to(device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.loads.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        super().__setstate__(state)
        self._handle = handle_of(self)

    def forward(
        self, x: Tensor, return_aux_loss: bool = False, *, token_ids: Tensor | None = None, step: int | None = None
    ) -> Tensor | WithAuxLoss:
        """x of any shape [..., D] -> the same; with return_aux_loss (y, the weighted balancing and z-loss), also in
        evaluation. [B, S, D] has sequences of S for balance_scope=sequence. token_ids: [...], for router=hash."""
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be d_model={self.d_model}")
        if torch.compiler.is_compiling():
            y, aux_loss = as_operation(self, self._handle, x, token_ids, step)
        else:
            y, aux_loss = self.run(x, token_ids, step)
        return WithAuxLoss(y, aux_loss) if return_aux_loss else y

    def run(self, x: Tensor, token_ids: Tensor | None, step: int | None) -> tuple[Tensor, Tensor]:
        """(y, the auxiliary loss): the forward pass itself, of which a compiled graph knows the shapes alone."""
        self.check_wrapping()
        x_TD = x.reshape(-1, self.d_model)
        context = self._context(x, token_ids, step)
        y_TD, stats = self.moe(x_TD, context)
        self.loads.count([stats.tally], self.training)
        y = self._dropped_out(y_TD, context).view(x.shape)
        return y.to(autocast_dtype(x) or x.dtype), stats.aux_loss

    @property
    def num_experts(self) -> int:
        return self.moe.config.num_experts

    @property
    def expert_counts(self) -> Tensor:
        """[E]: assignments to each expert in the last forward pass, of all ranks, before dropping; zeros before one."""
        return self.loads.of_last_pass(1, self.num_experts)[0]

    def balance(self, group: dist.ProcessGroup | None = None) -> None:
        """Where a bias balances (`balance`), once an optimizer step: move it by what training passes since counted.

        Without a mesh every rank of `group` (None: of torch.distributed's default group, where there is one) must call:
        the load is that of all of them, so that copies of the layer, as under DDP and FSDP, stay copies.
        """
        self.loads.balance([self.moe.router], group)

    def add_experts(self, n: int, init: Literal["clone", "random", "split"] = "clone", **options: Any) -> list[int]:
        """n closed experts, outputs unchanged until `open_experts`; see surgery/layers.py. Clones are of the experts
        most loaded in the last forward pass, unless `sources` says otherwise. Rebuild the optimizer afterwards."""
        if init == "clone" and self.loads.last is not None and not {"sources", "load_E"} & options.keys():
            options["load_E"] = self.loads.last[0]
        if init == "random":
            options = {"seed": self.seed, "name": "moe."} | options
        added = add_experts(self.moe, n, init, **options)
        self.loads.forget()
        return added

    def open_experts(self, ids: list[int]) -> None:
        """Let tokens go to added experts."""
        open_experts(self.moe, ids)

    def close_experts(self, ids: list[int]) -> None:
        """Let no token go to these experts."""
        close_experts(self.moe, ids)

    def remove_experts(self, ids: list[int]) -> list[int]:
        """Take experts out; returns the former numbers of those that stay. Closed ones leave the outputs unchanged."""
        stay = remove_experts(self.moe, ids)
        self.loads.forget()
        return stay

    def merge_experts(self, groups: list[list[int]], weights: Tensor | list[float] | None = None) -> list[list[int]]:
        """Each group becomes one expert, their mean weighted by `weights` [E]; returns the former numbers of each."""
        came_from = merge_experts(self.moe, groups, weights)
        self.loads.forget()
        return came_from

    def extra_repr(self) -> str:
        moe = self.moe.config
        return f"num_experts={moe.num_experts}, top_k={moe.top_k}, router={moe.router}, dropout={self.dropout}"

    def _context(self, x: Tensor, token_ids: Tensor | None, step: int | None) -> StepContext:
        step = self.pass_of(step)
        return StepContext(
            self.key_of("mixture", step),
            "train" if self.training else "eval",
            step=step,
            seq_len=x.shape[-2] if x.dim() > 2 else None,
            token_ids_T=None if token_ids is None else token_ids.reshape(-1),
        )

    def _dropped_out(self, y_TD: Tensor, context: StepContext) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return dropout_by_index(y_TD, rate, context.key.fold("dropout"), self.dp.rank * len(y_TD))


def _checked(
    options: dict[str, Any], d_model: int, d_ff: int, activation: Activation, mesh: Mesh, device_type: str
) -> MoEConfig:
    """The options as a section that keeps its rules, every `auto` resolved."""
    known = {field.name for field in fields(MoEConfig)} - {"every", "d_ff"}
    refuse_unknown(options, known)
    gated(activation)  # raises for a name that is none of NAMES
    moe = parse_as(MoEConfig, options, "MixtureOfExperts")
    problems = [f"{name}={value} is below 1" for name, value in (("d_model", d_model), ("d_ff", d_ff)) if value < 1]
    if moe.num_experts < 1:
        problems.append(f"num_experts={moe.num_experts} is below 1")
    parallel = ParallelConfig(ep=mesh.layout.ep, etp=mesh.etp, tp=mesh.tp.size)
    refuse([*problems, *moe_rules(moe, parallel, d_ff=d_ff, num_layers=1, section="")])
    return resolve_experts(moe, mesh.ep.size, device_type, section="")
