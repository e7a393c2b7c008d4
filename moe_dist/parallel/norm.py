"""Norms under any layout: the modules of blocks, and norms over a dim that is cut over tp."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.kernels.registry import norm_kernel
from moe_dist.parallel.collectives import copy_to_group, reduce_from_group
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * g (arXiv 1910.07467), in fp32 inside.

    Under sequence parallelism each rank sees a slice of the tokens, so the gradient of g is summed over tp.
    """

    def __init__(self, dim: int, eps: float, mesh: Mesh, kernels: str = "torch") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.shared = mesh.tp if mesh.sequence_parallel else Group()
        self.weight = parameter((dim,), ParamSpec((dim,), std=None))

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_group(self.weight, self.shared)
        return norm_kernel(self.kernels, x.device.type)(x, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * g + b (arXiv 1607.06450), by torch, in fp32 inside.

    Under sequence parallelism each rank sees a slice of the tokens, so the gradients of g and b are summed over tp.
    """

    def __init__(self, dim: int, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.eps = eps
        self.shared = mesh.tp if mesh.sequence_parallel else Group()
        self.weight = parameter((dim,), ParamSpec((dim,), std=None))
        self.bias = parameter((dim,), ParamSpec((dim,), std=0.0))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (copy_to_group(param, self.shared) for param in (self.weight, self.bias))
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def block_norm(kind: str, dim: int, eps: float, mesh: Mesh, kernels: str) -> RMSNorm | LayerNorm:
    """The norm that `model.norm` names: rms or layer. kernels: of RMSNorm."""
    return LayerNorm(dim, eps, mesh) if kind == "layer" else RMSNorm(dim, eps, mesh, kernels)


def norm_over_group(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, group: Group) -> Tensor:
    """The norm over all of the last dim of which each rank of `group` holds an equal slice; x, weight and bias are this
    rank's. With a bias layer norm (arXiv 1607.06450), without RMSNorm (arXiv 1910.07467); in fp32 inside.

    Every rank must call. The gradients of x, weight and bias are whole.
    """
    wide, width = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1] * group.size
    if bias is None:
        return (wide * (mean_over_slices(wide.square(), width, group) + eps).rsqrt() * weight).to(x.dtype)
    centred = wide - mean_over_slices(wide, width, group)
    variance = mean_over_slices(centred.square(), width, group)
    return (centred * (variance + eps).rsqrt() * weight + bias).to(x.dtype)


def mean_over_slices(x: Tensor, width: int, group: Group) -> Tensor:
    """[..., 1]: the mean of `width` numbers, of which each rank's x has some in its last dim. Every rank's part reads
    it, so its gradient is summed over them, too."""
    total = reduce_from_group(x.sum(-1, keepdim=True), group)
    return copy_to_group(total, group) / width
