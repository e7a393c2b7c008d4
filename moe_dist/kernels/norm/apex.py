"""RMSNorm by apex, whose kernels NVIDIA calls FusedRMSNorm.

As apex's FusedRMSNorm calls it: input and scale of one dtype, fp32 inside.

Legend: T tokens, D width.
"""

from torch import Tensor


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim; any dims before it."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    y_TD: Tensor = fused_rms_norm_affine(x_TD, scale_D.to(x_TD.dtype), scale_D.shape, eps)
    return y_TD
