"""Products x W^T on CPU by oneDNN, also in fp32, where torch.mm asks MKL.

torch.compile's name for the operator is used: eager torch has no other door to oneDNN's fp32 product. At experts' sizes
it is 5 to 50% faster than MKL's on AMD Zen 4, the more so the fewer rows. oneDNN compiles a kernel for every new number
of rows, so `rows_computed` says to which number callers should round up.

Legend: c rows, I in, O out.
"""

import torch
from torch import Tensor

ROUNDING = 8
_FEW = 32  # rows up to which rounding by 8 would cost more than there are sizes to compile for
_ALIKE = 4  # rows that products compute alike: the rest of a division by it has its own code, which rounds otherwise

_LOW = (torch.bfloat16, torch.float16)
_FP32 = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fp32_products() -> str:
    """Who computes them here, for the log."""
    return "oneDNN" if _FP32 else "MKL"


def rows_computed(count: int, dtype: torch.dtype) -> int:
    """count, rounded up: to 8 where kernels are compiled for a number of rows, else to 4, so that a row's result does
    not depend, to the bit, on how many others its expert has."""
    compiled = dtype in _LOW or (dtype == torch.float32 and _FP32)
    multiple = ROUNDING if compiled and count > _FEW else _ALIKE
    return -(-count // multiple) * multiple


def linear(x_cI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + bias, no autograd. x contiguous, W contiguous or the transpose of what is."""
    if x_cI.dtype == torch.float32 and _FP32:
        y_cO = torch.ops.mkldnn._linear_pointwise(x_cI, weight_OI, bias_O, "none", [], "")
        return y_cO if out is None else out.copy_(y_cO)
    if bias_O is None:
        return torch.mm(x_cI, weight_OI.t(), out=out)
    return torch.addmm(bias_O, x_cI, weight_OI.t(), out=out)


def add_linear(x_cI: Tensor, weight_OI: Tensor, out: Tensor) -> None:
    """out += x W^T."""
    if x_cI.dtype == torch.float32 and _FP32:
        out += linear(x_cI, weight_OI)
    else:
        out.addmm_(x_cI, weight_OI.t())
