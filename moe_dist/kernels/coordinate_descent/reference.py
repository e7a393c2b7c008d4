"""Coordinate descent as the papers write it, differentiated by autograd: the oracle of fused.py and triton.py.

Among N scores s, find weights y in [0, 1] that sum to k and make sum(y s) large, smoothed by an entropy of weight eps:
a soft choice of the k largest (arXiv 1502.04759; as a router, CoLT5, arXiv 2303.09752, section 3.1).

Legend: R rows, each chosen from on its own, N candidates of a row.
"""

import torch
from torch import Tensor

from moe_dist.kernels.coordinate_descent.schedule import Schedule


def coordinate_descent(
    s_RN: Tensor, k: float | Tensor, mask_RN: Tensor | None = None, schedule: Schedule | None = None
) -> tuple[Tensor, Tensor]:
    """(scores y [..., N], threshold a [..., 1]): a = eps (ln k - logsumexp((s + b) / eps)), b = -relu(s + a), from
    b = -s on; y = exp((s + a + b) / eps). So y is 1 where s >= -a and falls off below.

    In fp32, float64 for float64. k: how many to choose, above 0, a number or [...]. mask_RN: bool, False is not
    selectable and has y = 0; the threshold of a row without a candidate means nothing, but is finite.
    """
    schedule = schedule or Schedule()
    wide = torch.promote_types(s_RN.dtype, torch.float32)
    s_RN = s_RN.to(wide)
    mask_RN = torch.ones_like(s_RN, dtype=torch.bool) if mask_RN is None else mask_RN.expand_as(s_RN)
    some_R1 = mask_RN.any(-1, keepdim=True)
    mask_RN = mask_RN | ~some_R1  # a row without a candidate runs with all of them, and is put to zero at the end
    log_k_R1 = torch.as_tensor(k, dtype=wide, device=s_RN.device).expand(s_RN.shape[:-1])[..., None].log()
    b_RN = -s_RN
    for eps in schedule.temperatures():
        a_R1 = eps * (log_k_R1 - ((s_RN + b_RN) / eps).masked_fill(~mask_RN, -torch.inf).logsumexp(-1, keepdim=True))
        b_RN = -(s_RN + a_R1).relu()
    y_RN = ((s_RN + a_R1 + b_RN) / schedule.eps).exp()
    return y_RN.masked_fill(~mask_RN | ~some_R1, 0.0), a_R1
