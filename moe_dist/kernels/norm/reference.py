"""RMSNorm (arXiv 1910.07467) in plain torch, in fp32 inside.

Legend: T tokens, D width.
"""

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim; any dims before it."""
    wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    normed_TD = wide_TD * (wide_TD.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed_TD * scale_D).to(x_TD.dtype)
