"""A layer to operate on, and everything a step on it gives."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_dist.models.block import moe_layer
from moe_dist.moe.layer import MoE
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.mesh import Mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize
from tests.unit.helpers import context, tiny_model

if TYPE_CHECKING:
    from moe_dist.config.model import ModelConfig

D, WIDTH, E, T = 16, 24, 6, 40


def layer_of(mesh: Mesh | None = None, seed: int = 0, d_ff: list[int] | None = None, **changes: object) -> MoE:
    model: ModelConfig = tiny_model(**(dict(num_experts=E) | changes))
    if d_ff is not None:
        model = replace(model, moe=replace(model.moe, d_ff=d_ff))
    layer = moe_layer(model, layer=0, mesh=mesh or single_process_mesh())
    initialize(layer, seed)
    if getattr(layer.router, "bias_E", None) is not None:
        layer.router.bias_E.copy_(torch.linspace(-0.1, 0.1, layer.config.num_experts))
    return layer


def tokens(count: int = T, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


def run(layer: MoE, phase: str = "train", x_TD: Tensor | None = None) -> tuple[Tensor, MoEStats]:
    x_TD = tokens() if x_TD is None else x_TD
    return layer(x_TD, replace(context(phase=phase), token_ids_T=torch.arange(len(x_TD)) % 29))


def bits(layer: MoE) -> dict[str, Tensor]:
    """Everything a training and an evaluation step give, gradients too."""
    x_TD = tokens().requires_grad_()
    layer.zero_grad()
    y_TD, stats = run(layer, "train", x_TD)
    ((y_TD * torch.linspace(-1, 1, D)).sum() + stats.aux_loss).backward()
    found = {f"grad.{name}": param.grad for name, param in layer.named_parameters()}
    found |= {"y": y_TD.detach(), "x.grad": x_TD.grad, "eval": run(layer, "dropless")[0].detach()}
    for name in ("aux_loss", "balance_loss", "z_loss", "entropy", "load_E", "kept_E", "unserved"):
        found[name] = getattr(stats, name).detach()
    return found


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], old: list[int]) -> None:
    """`found` is of a layer whose experts `old` are the experts of `expected`, in order, and whose others are idle."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine = found[name]
        if mine.shape != value.shape:
            others = [i for i in range(len(mine)) if i not in old]
            assert torch.equal(mine[others], torch.zeros_like(mine[others])), name
            mine = mine[old]
        assert torch.equal(mine, value), name
