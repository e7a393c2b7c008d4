"""Products x W^T on CPU by oneDNN, also in fp32, where torch.mm asks MKL.

torch.compile's name for the operator is used: eager torch has no other door to oneDNN's fp32 product. Which of the two
is faster hangs on processor, shape and on how the matrix lies: at experts' sizes oneDNN takes 0.5 to 0.98 of MKL's time
into the hidden units on an AMD machine, and 0.5 to 1.17 of it out of them. So there are three choices:

| fp32 products | into hidden units, x W^T | out of them, h W |
|---------------|--------------------------|------------------|
| onednn        | oneDNN                   | oneDNN           |
| mixed         | oneDNN                   | MKL              |
| mkl           | MKL                      | MKL              |

One choice holds for any number of rows, so that a row's result does not hang on how many others its expert has. oneDNN
compiles a kernel for every new number of rows, so `rows_computed` says to which number callers should round up.

Legend: c rows, I in, O out.
"""

from typing import Literal

import torch
from torch import Tensor

ROUNDING = 8
_FEW = 32  # rows up to which rounding by 8 would cost more than there are sizes to compile for
_ALIKE = 4  # rows that products compute alike: the rest of a division by it has its own code, which rounds otherwise

_LOW = (torch.bfloat16, torch.float16)
_FP32 = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


Products = Literal["onednn", "mixed", "mkl"]
CHOICES: tuple[Products, ...] = ("onednn", "mixed", "mkl") if _FP32 else ("mkl",)
"""What this machine's torch has, the usual one first."""


def named(products: str) -> Products:
    """`auto` is the usual one. Raises ValueError for what is none of CHOICES."""
    if products == "auto":
        return CHOICES[0]
    for choice in CHOICES:
        if products == choice:
            return choice
    measured = "; `measured` is what `moe-dist train` finds out when it starts" if products == "measured" else ""
    raise ValueError(f"cpu_products={products}: this torch has {', '.join(CHOICES)}{measured}")


def describe_products(products: str) -> str:
    """For the log."""
    return {"onednn": "oneDNN", "mixed": "oneDNN, out of hidden units MKL", "mkl": "MKL"}[named(products)]


def rows_computed(count: int, dtype: torch.dtype) -> int:
    """count, rounded up: to 8 where kernels are compiled for a number of rows, else to 4, so that a row's result does
    not depend, to the bit, on how many others its expert has."""
    compiled = dtype in _LOW or (dtype == torch.float32 and _FP32)
    multiple = ROUNDING if compiled and count > _FEW else _ALIKE
    return -(-count // multiple) * multiple


def linear(
    x_cI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None, *, products: Products
) -> Tensor:
    """x W^T + bias, no autograd. x contiguous; W contiguous, into hidden units, or the transpose of what is, out of
    them."""
    if x_cI.dtype == torch.float32 and _by_onednn(weight_OI, products):
        y_cO = torch.ops.mkldnn._linear_pointwise(x_cI, weight_OI, bias_O, "none", [], "")
        return y_cO if out is None else out.copy_(y_cO)
    if bias_O is None:
        return torch.mm(x_cI, weight_OI.t(), out=out)
    return torch.addmm(bias_O, x_cI, weight_OI.t(), out=out)


def add_linear(x_cI: Tensor, weight_OI: Tensor, out: Tensor, *, products: Products) -> None:
    """out += x W^T."""
    if x_cI.dtype == torch.float32 and _by_onednn(weight_OI, products):
        out += linear(x_cI, weight_OI, products=products)
    else:
        out.addmm_(x_cI, weight_OI.t())


def _by_onednn(weight_OI: Tensor, products: Products) -> bool:
    assert products in CHOICES, f"{products} is none of {CHOICES}"
    return products == "onednn" or (products == "mixed" and weight_OI.is_contiguous())
