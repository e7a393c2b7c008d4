"""The layers of the comparison: ours, the dense bound, and other systems' layers with the same weights.

Each contestant is a module with forward(x_TD) -> (y_TD, auxiliary loss or None). `note` says where it differs from what
the cell asks for. A peer that is not installed, or cannot express a cell at all, is not in that cell.

Legend: T tokens, K top_k, D d_model, E experts, F expert hidden, R rows sorted by expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cells import Cell, Weights, choose
from torch import Tensor, nn

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.grouped_mm.measure import seconds_of_products
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.block import moe_layer
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Contestant:
    """exact: gives the plain maths of the cell (in fp32; low-precision routers may choose otherwise)."""

    layer: nn.Module
    exact: bool = True
    note: str = ""


def contestants(cell: Cell, w: Weights, device: torch.device) -> dict[str, Contestant]:
    """Ours first, the bound last. Ours with a limit also in pools, and in blocks of the padded wire; on CPU in fp32
    with the products that are measured to be fastest, as `cpu_products: measured` has them."""
    measured, note = {}, ""
    if device.type == "cpu" and cell.precision == "fp32":
        s = cell.shape
        seconds = seconds_of_products(max(1, cell.tokens * s.top_k // s.experts), s.d_model, s.d_ff, s.activation)
        products = min(seconds, key=lambda choice: seconds[choice])
        measured, note = {"cpu_products": products}, f"products {products}"
    found = {"moe_dist": Contestant(Ours(cell, w, device, **measured), note=note)}
    if cell.capacity is not None:
        pools, padded = (
            Ours(cell, w, device, capacity_pool=4, **measured),
            Ours(cell, w, device, dispatch="all_to_all", wire="padded", **measured),
        )
        found["moe_dist, pools of 4"] = Contestant(pools, exact=False, note="drops less")
        found["moe_dist, padded wire"] = Contestant(padded)
    found |= dict(_peers(cell, w, device))
    return found | {"dense bound": Contestant(Dense(cell, w), exact=False)}


def _peers(cell: Cell, w: Weights, device: torch.device) -> Iterator[tuple[str, Contestant]]:
    dropless = cell.capacity is None
    drops_nothing = "" if dropless else "drops nothing"
    yield "sort + grouped_mm", Contestant(SortedGroupedMM(cell, w), dropless, drops_nothing)
    if find_spec("deepspeed") and cell.shape.top_k <= 2:
        yield "DeepSpeed MoE", Contestant(DeepSpeed(cell, w), dropless)
    if find_spec("transformers"):
        if cell.shape.top_k == 1 and w.gate is None:
            yield "Transformers Switch", Contestant(Switch(cell, w))
        if w.gate is not None and cell.shape.top_k > 1:
            for kind in ("grouped_mm", "eager"):
                yield f"Transformers Mixtral {kind}", Contestant(Mixtral(cell, w, kind), dropless, drops_nothing)
    if find_spec("megatron") and device.type == "cpu":
        yield "Megatron SequentialMLP", Contestant(Megatron(cell, w), dropless, drops_nothing)
    if find_spec("st_moe_pytorch") and cell.shape.top_k > 1 and not dropless and cell.precision == "fp32":
        yield "st-moe-pytorch", Contestant(StMoE(cell, w), exact=False)
    if find_spec("scattermoe") and device.type == "cuda":
        yield "ScatterMoE", Contestant(Scatter(cell, w), dropless, drops_nothing)


class Ours(nn.Module):
    """The whole layer: router, capacity rule, dispatch, experts, losses and statistics."""

    def __init__(self, cell: Cell, w: Weights, device: torch.device, **moe_options: Any) -> None:
        super().__init__()
        s = cell.shape
        moe_options = {"capacity_factor": cell.capacity} | moe_options
        moe = MoEConfig(num_experts=s.experts, top_k=s.top_k, d_ff=s.d_ff, **moe_options)
        model = ModelConfig(d_model=s.d_model, num_layers=1, activation=s.activation, moe=moe)
        model = resolve_backends(model, ep=1, device_type=device.type)
        self.layer = moe_layer(model, layer=0, mesh=single_process_mesh()).to(device, cell.dtype)
        self.context = StepContext(RandomKey.of(0))
        experts = self.layer.experts
        pairs = [(self.layer.router.weight, w.router), (experts.w_gate, w.gate)]
        pairs += [(experts.w_up, w.up), (experts.w_out, w.out)]
        _load(*pairs)

    def forward(self, x_TD: Tensor) -> Output:
        y_TD, stats = self.layer(x_TD, self.context)
        return y_TD, stats.aux_loss


class Dense(nn.Module):
    """The bound: one MLP of the width that a token's experts have together, one Linear per matrix, no router."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        k = cell.shape.top_k
        self.gate = None if w.gate is None else _linear(w.gate[:k].flatten(0, 1))
        self.up, self.out = _linear(w.up[:k].flatten(0, 1)), _linear(w.out[:k].flatten(0, 1).t())

    def forward(self, x_TD: Tensor) -> Output:
        up_TF = self.up(x_TD)
        return self.out(F.relu(up_TF) if self.gate is None else F.silu(self.gate(x_TD)) * up_TF), None


class Expert(nn.Module):
    """One expert as plain Linears, for peers that take the expert as a module."""

    def __init__(self, w: Weights, e: int) -> None:
        super().__init__()
        self.gate = None if w.gate is None else _linear(w.gate[e])
        self.up, self.out = _linear(w.up[e]), _linear(w.out[e].t())

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.out(F.relu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class SortedGroupedMM(nn.Module):
    """What one writes first: sort by expert, two torch grouped products (gate and up in one), weigh and add up."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        self.top_k = cell.shape.top_k
        first = w.up if w.gate is None else torch.cat([w.gate, w.up], 1)
        self.router, self.gated = nn.Parameter(w.router.clone()), w.gate is not None
        self.w_in, self.w_out = nn.Parameter(first.mT.contiguous()), nn.Parameter(w.out.clone())

    def forward(self, x_TD: Tensor) -> Output:
        weights_TK, experts_TK = choose(x_TD, self.router, self.top_k)
        order_R = experts_TK.flatten().argsort(stable=True)
        offsets_E = experts_TK.flatten().bincount(minlength=len(self.w_in)).cumsum(0).int()
        source_R = order_R // self.top_k
        hidden_RF = F.grouped_mm(x_TD[source_R], self.w_in, offs=offsets_E)
        if self.gated:
            gate_RF, up_RF = hidden_RF.chunk(2, -1)
            hidden_RF = F.silu(gate_RF) * up_RF
        else:
            hidden_RF = hidden_RF.relu()
        y_RD = F.grouped_mm(hidden_RF, self.w_out, offs=offsets_E)
        y_RD = y_RD * weights_TK.flatten()[order_R, None].to(y_RD.dtype)
        return torch.zeros_like(x_TD).index_add(0, source_R, y_RD), None


class DeepSpeed(nn.Module):
    """deepspeed.moe.layer.MoE with capacity, or drop_tokens=False; no noise, no random token selection."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        self.layer = DeepSpeedMoE(
            cell.shape.d_model,
            Expert(w, 0),
            num_experts=cell.shape.experts,
            k=cell.shape.top_k,
            capacity_factor=cell.capacity or 1.0,
            min_capacity=1,
            drop_tokens=cell.capacity is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(w.up.device, cell.dtype)
        inner = self.layer.deepspeed_moe
        inner.experts.deepspeed_experts = nn.ModuleList(Expert(w, e) for e in range(cell.shape.experts))
        _load((inner.gate.wg.weight, w.router))

    def forward(self, x_TD: Tensor) -> Output:
        y_TD, aux, _ = self.layer(x_TD)
        return y_TD, aux


class Switch(nn.Module):
    """transformers' SwitchTransformersSparseMLP."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        s = cell.shape
        config = SwitchTransformersConfig(
            d_model=s.d_model,
            d_ff=s.d_ff,
            num_experts=s.experts,
            expert_capacity=cell.limit or cell.tokens,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            dense_act_fn="relu",
        )
        self.layer = SwitchTransformersSparseMLP(config).to(w.up.device, cell.dtype)
        _load((self.layer.router.classifier.weight, w.router))
        for e, expert in enumerate(self.layer.experts.values()):
            _load((expert.wi.weight, w.up[e]), (expert.wo.weight, w.out[e].t()))

    def forward(self, x_TD: Tensor) -> Output:
        return self.layer(x_TD[None])[0], None


class Mixtral(nn.Module):
    """transformers' MixtralSparseMoeBlock, experts eager or grouped_mm."""

    def __init__(self, cell: Cell, w: Weights, kind: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        s = cell.shape
        config = MixtralConfig(
            hidden_size=s.d_model, intermediate_size=s.d_ff, num_local_experts=s.experts, num_experts_per_tok=s.top_k
        )
        config._experts_implementation = kind
        self.layer = MixtralSparseMoeBlock(config).to(w.up.device, cell.dtype)
        assert w.gate is not None
        experts = self.layer.experts
        _load((self.layer.gate.weight, w.router), (experts.down_proj, w.out.mT))
        _load((experts.gate_up_proj, torch.cat([w.gate, w.up], 1)))

    def forward(self, x_TD: Tensor) -> Output:
        y = self.layer(x_TD[None])
        return y[0], None


class Megatron(nn.Module):
    """Megatron-core's SequentialMLP between its permute and unpermute; router of plain torch."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.transformer_config import TransformerConfig

        s = cell.shape
        config = TransformerConfig(
            num_layers=1,
            hidden_size=s.d_model,
            num_attention_heads=8,
            ffn_hidden_size=s.d_ff,
            moe_ffn_hidden_size=s.d_ff,
            num_moe_experts=s.experts,
            gated_linear_unit=w.gate is not None,
            activation_func=F.relu if w.gate is None else F.silu,
            add_bias_linear=False,
            bias_activation_fusion=False,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            params_dtype=cell.dtype,
            bf16=cell.precision == "bf16",
        )
        if not dist.is_initialized():  # it asks for a group even where there is nobody to talk to
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        world = dist.group.WORLD
        groups = ProcessGroupCollection(ep=world, expt_tp=world, expt_dp=world)
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.top_k, self.router = s.top_k, nn.Parameter(w.router.clone())
        self.layer = SequentialMLP(s.experts, config, submodules, groups)
        for e, expert in enumerate(self.layer.local_experts):
            first = w.up[e] if w.gate is None else torch.cat([w.gate[e], w.up[e]])
            _load((expert.linear_fc1.weight, first), (expert.linear_fc2.weight, w.out[e].t()))

    def forward(self, x_TD: Tensor) -> Output:
        from megatron.core.transformer.moe.moe_utils import permute, unpermute

        weights_TK, experts_TK = choose(x_TD, self.router, self.top_k)
        probs_TE = weights_TK.new_zeros(len(x_TD), len(self.router)).scatter(1, experts_TK, weights_TK)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        rows_RD, probs_R, back_R = permute(x_TD, chosen_TE, probs=probs_TE, num_out_tokens=experts_TK.numel())[:3]
        y_RD, _ = self.layer(rows_RD, chosen_TE.sum(0), probs_R)
        return unpermute(y_RD, back_R, x_TD.shape), None


class StMoE(nn.Module):
    """st-moe-pytorch with our expert; it chooses its second expert by chance, so only its time is comparable."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        from st_moe_pytorch import MoE as StMoELayer

        s = cell.shape
        experts = nn.ModuleList(Expert(w, e) for e in range(s.experts))
        self.layer = StMoELayer(
            s.d_model,
            num_experts=s.experts,
            gating_top_n=s.top_k,
            capacity_factor_train=(cell.capacity or 1.0) * s.top_k,
            experts=experts,
        ).to(w.up.device, cell.dtype)

    def forward(self, x_TD: Tensor) -> Output:
        outputs, total_aux_loss, _, _ = self.layer(x_TD[None])
        return outputs[0], total_aux_loss


class Liger(nn.Module):
    """Liger-Kernel's fused experts (SwiGLU, GPU only); router of plain torch."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        assert w.gate is not None
        self.top_k, self.router = cell.shape.top_k, nn.Parameter(w.router.clone())
        self.gate_up = nn.Parameter(torch.cat([w.gate, w.up], 1))
        self.down = nn.Parameter(w.out.mT.contiguous())

    def forward(self, x_TD: Tensor) -> Output:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        weights_TK, experts_TK = choose(x_TD, self.router, self.top_k)
        weights_TK = weights_TK.to(x_TD.dtype)
        return LigerFusedMoEFunction.apply(x_TD, self.gate_up, self.down, experts_TK.int(), weights_TK), None


class Scatter(nn.Module):
    """ScatterMoE's MLP or GLUMLP; router of plain torch."""

    def __init__(self, cell: Cell, w: Weights) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP, MLP

        s = cell.shape
        kind: Callable[..., nn.Module] = MLP if w.gate is None else GLUMLP
        act = nn.ReLU() if w.gate is None else nn.SiLU()
        self.top_k, self.router = s.top_k, nn.Parameter(w.router.clone())
        self.layer = kind(s.d_model, s.d_ff, s.experts, s.top_k, activation=act).to(w.up.device, cell.dtype)
        first = w.up if w.gate is None else torch.cat([w.up, w.gate], 1)  # its GLU bends the second half
        _load((self.layer.experts.weight, first), (self.layer.output_experts.weight, w.out.mT))

    def forward(self, x_TD: Tensor) -> Output:
        weights_TK, experts_TK = choose(x_TD, self.router, self.top_k)
        return self.layer(x_TD, weights_TK, experts_TK), None


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    return layer


def _load(*pairs: tuple[nn.Parameter | None, Tensor | None]) -> None:
    """Copy weights into parameters, each of the same shape."""
    for parameter, value in pairs:
        if parameter is not None and value is not None:
            assert parameter.shape == value.shape, (parameter.shape, value.shape)
            with torch.no_grad():
                parameter.copy_(value)
