"""Layers whose weight is cut over the tensor-parallel group, always along dim 0.

A tensor-parallel region is entered once and left once: `enter` makes the full tokens available to every rank's part,
column-parallel layers (weight [out, in], cut over out) may follow in any number, one row-parallel layer (weight stored
[in, out], cut over in) gives partial sums, and `leave` adds them up. With mesh.sequence_parallel, tokens outside a
region are cut over the same group. A bias of column-parallel layers is cut with their outputs; one of row-parallel
layers comes after `leave`, once, as `SharedBias`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.parallel.collectives import (
    copy_to_group,
    gather_from_group,
    gather_sequence,
    reduce_from_group,
    scatter_sequence,
    split_to_group,
)
from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec, parameter


def enter(x_TD: Tensor, mesh: Mesh) -> Tensor:
    """Into a tensor-parallel region: all tokens on every rank; gradients of the parts are summed on the way back."""
    return gather_sequence(x_TD, mesh.tp) if mesh.sequence_parallel else copy_to_group(x_TD, mesh.tp)


def leave(x_TD: Tensor, mesh: Mesh) -> Tensor:
    """Out of a tensor-parallel region: partial sums become sums, cut by tokens under sequence parallelism."""
    return scatter_sequence(x_TD, mesh.tp) if mesh.sequence_parallel else reduce_from_group(x_TD, mesh.tp)


class TokenSlices:
    """For layers that do other work on each tp rank's own slice of the tokens. Under sequence parallelism tokens are
    cut already."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def own(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.mesh.sequence_parallel else split_to_group(x_TD, self.mesh.tp)

    def all(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.mesh.sequence_parallel else gather_from_group(y_TD, self.mesh.tp)


def _part(size: int, tp: Group, what: str) -> tuple[int, int]:
    if size % tp.size:
        raise ValueError(f"{what}={size} is not divisible by tp={tp.size}")
    return size // tp.size, size // tp.size * tp.rank


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with W [out, in] cut over out, b [out] if asked for: [T, in] -> [T, out / tp]."""

    def __init__(self, in_dim: int, out_dim: int, tp: Group, std: float, bias: bool = False) -> None:
        super().__init__()
        local, start = _part(out_dim, tp, "out_dim")
        self.weight = parameter((local, in_dim), ParamSpec((out_dim, in_dim), "tensor", start * in_dim, std))
        self.bias = parameter((local,), ParamSpec((out_dim,), "tensor", start, 0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W with W [in, out] cut over in: [T, in / tp] -> partial sums [T, out]; `leave` adds them."""

    def __init__(self, in_dim: int, out_dim: int, tp: Group, std: float) -> None:
        super().__init__()
        local, start = _part(in_dim, tp, "in_dim")
        self.weight = parameter((local, out_dim), ParamSpec((in_dim, out_dim), "tensor", start * out_dim, std))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SharedBias(nn.Module):
    """y + b outside of tensor-parallel regions, b [dim] the same on every rank: [T, dim] -> [T, dim].

    Under sequence parallelism each rank sees a slice of the tokens, so the gradient of b is summed over tp.
    """

    def __init__(self, dim: int, mesh: Mesh) -> None:
        super().__init__()
        self.shared = mesh.tp if mesh.sequence_parallel else Group()
        self.bias = parameter((dim,), ParamSpec((dim,), std=0.0))

    def forward(self, y_TD: Tensor) -> Tensor:
        return y_TD + copy_to_group(self.bias, self.shared)


class PositionEmbedding(nn.Module):
    """Rows of W [N, D], the same on every rank: places [T] -> [T, D], outside of tensor-parallel regions.

    Under sequence parallelism each rank sees a slice of the tokens, so the gradient of W is summed over tp.
    """

    def __init__(self, count: int, d_model: int, mesh: Mesh, std: float) -> None:
        super().__init__()
        self.count = count
        self.shared = mesh.tp if mesh.sequence_parallel else Group()
        self.weight = parameter((count, d_model), ParamSpec((count, d_model), std=std))

    def forward(self, places_T: Tensor) -> Tensor:
        return F.embedding(places_T, copy_to_group(self.weight, self.shared))


class VocabParallelEmbedding(nn.Module):
    """Rows of W [V, D] cut over the vocabulary: ids [T] -> partial rows [T, D], zero where another rank has the id."""

    def __init__(self, vocab_size: int, d_model: int, tp: Group, std: float) -> None:
        super().__init__()
        local, self.start = _part(vocab_size, tp, "vocab_size")
        self.tp = tp
        spec = ParamSpec((vocab_size, d_model), "tensor", self.start * d_model, std)
        self.weight = parameter((local, d_model), spec)

    def forward(self, ids_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(ids_T, self.weight)
        local_T = ids_T - self.start
        absent_T = (local_T < 0) | (local_T >= self.weight.shape[0])
        rows_TD = F.embedding(local_T.masked_fill(absent_T, 0), self.weight)
        return rows_TD.masked_fill(absent_T[:, None], 0.0)
