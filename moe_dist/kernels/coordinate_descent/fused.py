"""Coordinate descent in torch, with the gradient written by hand.

As s + b = min(s, -a), all that one iteration hands to the next is a number for each row, a. With r = s - max(s) and
d = relu(max(s) + a), the terms of the sum are exp(min(r + d, 0) / eps), the largest of them 1:

    a' = eps (ln k - ln sum exp(min(r + d, 0) / eps)) - min(max(s), -a)

With p = softmax(min(s, -a) / eps), the derivatives of a' are -p_i for s_i <= -a, and sum of p_i over s_i > -a for a.
Only s and the a of every iteration are kept for the backward pass.

Legend: R rows, N candidates of a row, I iterations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.kernels.coordinate_descent.schedule import Schedule


def coordinate_descent(
    s_RN: Tensor, k: float | Tensor, mask_RN: Tensor | None = None, schedule: Schedule | None = None
) -> tuple[Tensor, Tensor]:
    """As reference.coordinate_descent."""
    schedule = schedule or Schedule()
    s_RN, log_k_R1 = prepare(s_RN, k, mask_RN)
    y_RN, a_R1 = _CoordinateDescent.apply(s_RN.flatten(0, -2), log_k_R1.flatten(0, -2), schedule)
    return y_RN.view(s_RN.shape), a_R1.view(log_k_R1.shape)


def prepare(s_RN: Tensor, k: float | Tensor, mask_RN: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s in fp32 or float64, -inf where not selectable; ln k [..., 1])."""
    wide = torch.promote_types(s_RN.dtype, torch.float32)
    s_RN = s_RN.to(wide)
    if mask_RN is not None:
        s_RN = s_RN.masked_fill(~mask_RN, -torch.inf)
    log_k = torch.as_tensor(k, dtype=wide, device=s_RN.device).log()
    return s_RN, log_k.expand(s_RN.shape[:-1])[..., None]


class _CoordinateDescent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s_RN: Tensor, log_k_R1: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        top_R1 = s_RN.amax(-1, keepdim=True)
        top_R1.masked_fill_(top_R1 == -torch.inf, 0.0)
        relative_RN, terms_RN = s_RN - top_R1, torch.empty_like(s_RN)
        # The first iteration has s + b = 0: a sum of ones, whatever s is.
        log_number_R1 = (relative_RN > -torch.inf).sum(-1, keepdim=True, dtype=s_RN.dtype).clamp_(min=1.0).log_()
        steps = schedule.temperatures()
        seen = [steps[0] * (log_k_R1 - log_number_R1)]
        for eps in steps[1:]:
            a_R1 = seen[-1]
            torch.add(relative_RN, (top_R1 + a_R1).relu_(), out=terms_RN)
            total_R1 = terms_RN.clamp_(max=0.0).mul_(1 / eps).exp_().sum(-1, keepdim=True)
            total_R1.clamp_(min=1.0)  # one term is 1; a row without a candidate has none
            seen.append(eps * (log_k_R1 - total_R1.log_()) - torch.minimum(top_R1, -a_R1))
        ctx.schedule = schedule
        ctx.save_for_backward(s_RN, log_k_R1, torch.stack(seen))
        y_RN = torch.add(s_RN, seen[-1], out=terms_RN).clamp_(max=0.0).mul_(1 / schedule.eps).exp_()
        return y_RN, seen[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_RN: Tensor, grad_a_R1: Tensor) -> tuple[Tensor, None, None]:
        s_RN, log_k_R1, a_IR1 = ctx.saved_tensors
        steps = ctx.schedule.temperatures()
        below_RN = s_RN + a_IR1[-1]
        grad_s_RN = (below_RN.clamp(max=0.0) / ctx.schedule.eps).exp_().mul_(grad_y_RN).div_(ctx.schedule.eps)
        grad_s_RN.masked_fill_(below_RN > 0, 0.0)
        grad_R1 = grad_a_R1 + grad_s_RN.sum(-1, keepdim=True)
        for index in range(len(steps) - 1, 0, -1):
            before_R1, eps = a_IR1[index - 1], steps[index]
            log_sum_R1 = log_k_R1 - a_IR1[index] / eps
            p_RN = (s_RN / eps).sub_(log_sum_R1).exp_().masked_fill_(s_RN > -before_R1, 0.0)
            grad_s_RN.addcmul_(p_RN, grad_R1, value=-1)
            grad_R1 = grad_R1 * (1 - p_RN.sum(-1, keepdim=True))  # all p sum to 1
        return grad_s_RN, None, None
