"""The coordinate descent of a `kernels` setting; all of them take the same arguments and share one meaning."""

from collections.abc import Callable

from torch import Tensor

from moe_dist.kernels.coordinate_descent import fused
from moe_dist.kernels.coordinate_descent.schedule import Schedule

Descent = Callable[[Tensor, float | Tensor, Tensor | None, Schedule | None], tuple[Tensor, Tensor]]
"""(s [..., N], k, mask [..., N], schedule) -> (scores [..., N], threshold [..., 1])."""


def coordinate_descent(kernels: str) -> Descent:
    if kernels == "triton":
        from moe_dist.kernels.coordinate_descent.triton import coordinate_descent as on_gpu

        return on_gpu
    return fused.coordinate_descent
