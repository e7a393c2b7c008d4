"""Coordinate descent in one launch: a program holds its row in registers through all iterations, forward and backward.

The maths of fused.py. Temperatures are read from memory, so that all schedules of one length share a kernel.

Legend: R rows, N candidates of a row (inside kernels: the next power of two), I iterations.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.coordinate_descent.fused import prepare
from moe_dist.kernels.coordinate_descent.schedule import Schedule
from moe_dist.kernels.launch import check_launch

MAX_CANDIDATES = 8192


def coordinate_descent(
    s_RN: Tensor, k: float | Tensor, mask_RN: Tensor | None = None, schedule: Schedule | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.coordinate_descent, for rows of up to 8192 candidates, none of them float64."""
    check_launch("coordinate_descent", _forward, s_RN)
    if s_RN.shape[-1] > MAX_CANDIDATES:
        raise ValueError(
            f"coordinate_descent: the Triton kernel holds a row of {s_RN.shape[-1]} numbers in registers and takes up "
            f"to {MAX_CANDIDATES}: use kernels=torch"
        )
    s_RN, log_k_R1 = prepare(s_RN, k, mask_RN)
    y_RN, a_R1 = _CoordinateDescent.apply(s_RN.flatten(0, -2), log_k_R1.flatten(), schedule or Schedule())
    return y_RN.view(s_RN.shape), a_R1.view(log_k_R1.shape)


def descent_tile(candidates: int) -> tuple[int, int]:
    """(padded number, warps): 32 numbers a thread at most."""
    padded = triton.next_power_of_2(candidates)
    return padded, min(max(padded // 512, 1), 16)


class _CoordinateDescent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s_RN: Tensor, log_k_R: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        s_RN, log_k_R = s_RN.contiguous(), log_k_R.contiguous()
        rows, candidates = s_RN.shape
        eps_I = torch.tensor(schedule.temperatures(), dtype=torch.float32, device=s_RN.device)
        y_RN, a_RI = torch.empty_like(s_RN), s_RN.new_empty(rows, len(eps_I))
        padded, warps = descent_tile(candidates)
        if s_RN.numel():
            _forward[(rows,)](
                *(s_RN, log_k_R, eps_I, y_RN, a_RI, candidates), STEPS=len(eps_I), N_PAD=padded, num_warps=warps
            )
        ctx.save_for_backward(s_RN, log_k_R, eps_I, a_RI)
        return y_RN, a_RI[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_RN: Tensor, grad_a_R: Tensor) -> tuple[Tensor, None, None]:
        s_RN, log_k_R, eps_I, a_RI = ctx.saved_tensors
        grad_s_RN = torch.empty_like(s_RN)
        rows, candidates = s_RN.shape
        padded, warps = descent_tile(candidates)
        if s_RN.numel():
            _backward[(rows,)](
                *(s_RN, log_k_R, eps_I, a_RI, grad_y_RN.contiguous(), grad_a_R.contiguous(), grad_s_RN, candidates),
                **dict(STEPS=len(eps_I), N_PAD=padded, num_warps=warps),
            )
        return grad_s_RN, None, None


@triton.jit
def _forward(
    s_ptr: tl.tensor,
    log_k_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    y_ptr: tl.tensor,
    a_ptr: tl.tensor,
    candidates: tl.tensor,
    STEPS: tl.constexpr,
    N_PAD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.arange(0, N_PAD)
    s_N = tl.load(s_ptr + row * candidates + column_N, mask=column_N < candidates, other=float("-inf"))
    log_k = tl.load(log_k_ptr + row)
    there_N = s_N > float("-inf")
    number = tl.sum(there_N.to(tl.float32), 0)
    top = tl.where(number > 0, tl.max(s_N, 0), 0.0)
    eps = tl.load(eps_ptr)
    a = eps * (log_k - tl.log(tl.maximum(number, 1.0)))
    tl.store(a_ptr + row * STEPS, a)
    for index in range(1, STEPS):
        eps = tl.load(eps_ptr + index)
        distance_N = tl.minimum(s_N - top + tl.maximum(top + a, 0.0), 0.0)
        total = tl.maximum(tl.sum(tl.exp(distance_N / eps), 0), 1.0)
        a = eps * (log_k - tl.log(total)) - tl.minimum(top, -a)
        tl.store(a_ptr + row * STEPS + index, a)
    y_N = tl.exp(tl.minimum(s_N + a, 0.0) / eps)
    tl.store(y_ptr + row * candidates + column_N, y_N, mask=column_N < candidates)


@triton.jit
def _backward(
    s_ptr: tl.tensor,
    log_k_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    a_ptr: tl.tensor,
    grad_y_ptr: tl.tensor,
    grad_a_ptr: tl.tensor,
    grad_s_ptr: tl.tensor,
    candidates: tl.tensor,
    STEPS: tl.constexpr,
    N_PAD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.arange(0, N_PAD)
    mask_N = column_N < candidates
    s_N = tl.load(s_ptr + row * candidates + column_N, mask=mask_N, other=float("-inf"))
    grad_y_N = tl.load(grad_y_ptr + row * candidates + column_N, mask=mask_N, other=0.0)
    log_k = tl.load(log_k_ptr + row)
    eps, a = tl.load(eps_ptr + STEPS - 1), tl.load(a_ptr + row * STEPS + STEPS - 1)
    y_N = tl.exp(tl.minimum(s_N + a, 0.0) / eps)
    grad_s_N = tl.where(s_N <= -a, y_N * grad_y_N / eps, 0.0)
    grad = tl.load(grad_a_ptr + row) + tl.sum(grad_s_N, 0)
    for back in range(1, STEPS):
        index = STEPS - back
        eps, before = tl.load(eps_ptr + index), tl.load(a_ptr + row * STEPS + index - 1)
        log_sum = log_k - a / eps
        p_N = tl.exp(tl.minimum(s_N, -before) / eps - log_sum)
        free_N = tl.where(s_N <= -before, p_N, 0.0)
        grad_s_N -= free_N * grad
        grad *= tl.sum(p_N - free_N, 0)
        a = before
    tl.store(grad_s_ptr + row * candidates + column_N, grad_s_N, mask=mask_N)
