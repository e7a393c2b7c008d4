"""The RMSNorm module of blocks, under any layout."""

from torch import Tensor, nn

from moe_dist.kernels.registry import norm_kernel
from moe_dist.parallel.collectives import copy_to_group
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
