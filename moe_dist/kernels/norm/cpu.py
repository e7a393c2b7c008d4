"""RMSNorm on CPU, with the gradient written by hand.

Torch has no kernel for it there, only a composition that autograd differentiates step by step. With n = x / rms(x) and
p = dy * n: dg = sum over tokens of p, dx = (dy * g - n * mean(p * g)) / rms(x).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32 inside."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed, wide_weight = x * inverse, weight.to(inverse.dtype)
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ wide_weight).div_(x.shape[-1])
        grad_x = (grad * wide_weight).addcmul_(normed, mean[..., None], value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
