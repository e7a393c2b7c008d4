"""Which implementation of a kernel a name of the configuration stands for. Nothing falls back."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.norm.cpu import rms_norm as cpu_rms_norm
from moe_dist.kernels.top_k.reference import TopK, top_k_experts


def check_triton(field: str, instead: str, device_type: str) -> None:
    """Raises ValueError, one line that names `instead`, where Triton cannot run."""
    if find_spec("triton") is None:
        raise ValueError(f"{field}=triton, but triton is not installed: pip install triton, or set it to {instead}")
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{field}=triton needs a GPU, but this run is on cpu: set it to {instead} "
            "(TRITON_INTERPRET=1 runs the kernels on CPU, slowly, to look at their numbers)"
        )


def top_k_kernel(kernels: str) -> Callable[..., TopK]:
    """`top_k_experts` of kernels/top_k."""
    if kernels == "triton":
        from moe_dist.kernels.top_k.triton import top_k_experts as fused

        return fused
    return top_k_experts


def norm_kernel(kernels: str, device_type: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """`rms_norm(x, weight, eps)` of kernels/norm; torch's own on devices that have one."""
    if kernels == "apex":
        from moe_dist.kernels.norm.apex import rms_norm as of_apex

        return of_apex
    if kernels == "triton":
        from moe_dist.kernels.norm.triton import rms_norm as fused

        return fused
    if device_type == "cpu":
        return cpu_rms_norm
    return lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
