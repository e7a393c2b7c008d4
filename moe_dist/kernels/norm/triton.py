"""RMSNorm, forward and backward in one pass each over x.

A program holds whole rows in registers. Backward, each program adds up the scale's gradient over the rows it visits and
writes one partial row; torch adds those: no atomics, the same bits on every run. Only x and 1 / rms are kept.

Legend: T tokens, D width (inside kernels: the next power of two), B rows of a block, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.launch import check_launch

MAX_WIDTH = 8192
_TILE = 4096
_PROGRAMS = 256  # of the backward pass: about two for each processor of an H100, and few partial rows


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim, up to 8192 wide; any dims before it."""
    check_launch("rms_norm", _forward, x_TD)
    if x_TD.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"rms_norm: the Triton kernel holds a row of {x_TD.shape[-1]} numbers in registers and takes up to "
            f"{MAX_WIDTH}: use kernels=torch"
        )
    return _RMSNorm.apply(x_TD, scale_D, eps)


def norm_tile(width: int) -> tuple[int, int, int]:
    """(rows of a block, padded width, warps): 32 numbers a thread at most."""
    padded = triton.next_power_of_2(width)
    rows = max(_TILE // padded, 1)
    return rows, padded, max(rows * padded // 1024, 4)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        x_TD, scale_D = x_TD.contiguous(), scale_D.contiguous()
        width = x_TD.shape[-1]
        tokens = x_TD.numel() // width
        y_TD = torch.empty_like(x_TD)
        inverse_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
        rows, padded, warps = norm_tile(width)
        if tokens:
            _forward[(triton.cdiv(tokens, rows),)](
                *(x_TD, scale_D, y_TD, inverse_T, tokens, eps), D=width, D_PAD=padded, BLOCK=rows, num_warps=warps
            )
        ctx.save_for_backward(x_TD, scale_D, inverse_T)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, scale_D, inverse_T = ctx.saved_tensors
        grad_TD, width, tokens = grad_TD.contiguous(), x_TD.shape[-1], inverse_T.numel()
        rows, padded, warps = norm_tile(width)
        programs = min(triton.cdiv(tokens, rows), _PROGRAMS)
        grad_x_TD = torch.empty_like(x_TD)
        grad_scale_PD = torch.empty(programs, width, dtype=torch.float32, device=x_TD.device)
        if tokens:
            _backward[(programs,)](
                *(x_TD, scale_D, inverse_T, grad_TD, grad_x_TD, grad_scale_PD, tokens, triton.cdiv(tokens, rows)),
                **dict(PROGRAMS=programs, D=width, D_PAD=padded, BLOCK=rows, num_warps=warps),
            )
        return grad_x_TD, grad_scale_PD.sum(0).to(scale_D.dtype), None


@triton.jit
def _forward(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    y_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    tokens: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column_D = tl.arange(0, D_PAD)
    at_BD = row_B[:, None] * D + column_D[None, :]
    mask_BD = (row_B < tokens)[:, None] & (column_D < D)[None, :]
    x_BD = tl.load(x_ptr + at_BD, mask=mask_BD, other=0.0).to(tl.float32)
    scale_D = tl.load(scale_ptr + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    inverse_B = 1.0 / tl.sqrt(tl.sum(x_BD * x_BD, 1) / D + eps)
    tl.store(y_ptr + at_BD, x_BD * inverse_B[:, None] * scale_D[None, :], mask=mask_BD)
    tl.store(inverse_ptr + row_B, inverse_B, mask=row_B < tokens)


@triton.jit
def _backward(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_scale_ptr: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    PROGRAMS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """With n = x / rms(x) and g = dy * scale:  dscale = sum over tokens of dy * n,  dx = (g - n mean(g n)) / rms(x)."""
    column_D = tl.arange(0, D_PAD)
    scale_D = tl.load(scale_ptr + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    grad_scale_BD = tl.zeros([BLOCK, D_PAD], tl.float32)
    for block in range(tl.program_id(0), blocks, PROGRAMS):
        row_B = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        at_BD = row_B[:, None] * D + column_D[None, :]
        mask_BD = (row_B < tokens)[:, None] & (column_D < D)[None, :]
        inverse_B = tl.load(inverse_ptr + row_B, mask=row_B < tokens, other=0.0)
        normed_BD = tl.load(x_ptr + at_BD, mask=mask_BD, other=0.0).to(tl.float32) * inverse_B[:, None]
        grad_BD = tl.load(grad_ptr + at_BD, mask=mask_BD, other=0.0).to(tl.float32)
        grad_scale_BD += grad_BD * normed_BD
        grad_BD *= scale_D[None, :]
        mean_B = tl.sum(grad_BD * normed_BD, 1) / D
        grad_x_BD = (grad_BD - normed_BD * mean_B[:, None]) * inverse_B[:, None]
        tl.store(grad_x_ptr + at_BD, grad_x_BD, mask=mask_BD)
    out_D = tl.program_id(0).to(tl.int64) * D + column_D
    tl.store(grad_scale_ptr + out_D, tl.sum(grad_scale_BD, 0), mask=column_D < D)
