"""Which kernels sort rows by expert, gather them and add them up again."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import combine_rows, gather_rows


class Permutation(NamedTuple):
    """Three operations of one backend; what they do is in order.py and reference.py."""

    sort_rows: Callable[[Tensor, Tensor | None, int, int | None], RowOrder] = RowOrder.of
    gather_rows: Callable[[Tensor, RowOrder], Tensor] = gather_rows
    combine_rows: Callable[[Tensor, Tensor | None, RowOrder], Tensor] = combine_rows


def permutation(kernels: str) -> Permutation:
    """`torch` or `triton`, as in ModelConfig.kernels."""
    if kernels == "triton":
        from moe_dist.kernels.permute import triton

        return Permutation(triton.sort_rows, triton.gather_rows, triton.combine_rows)
    return Permutation()
