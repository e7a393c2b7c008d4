"""Collectives, and the differentiable pairs that tensor, sequence and expert parallelism are made of.

Everything here takes a `Group` and is the identity on a group of one, so the layers read the same in any layout.
Tensors are cut and joined along dim 0, which is always the tokens (or the rows sent to experts).

| function            | forward            | backward           | used for                                           |
|---------------------|--------------------|--------------------|----------------------------------------------------|
| copy_to_group       | identity           | all-reduce         | input of a column-parallel layer; shared parameters |
| reduce_from_group   | all-reduce         | identity           | output of a row-parallel layer                     |
| mean_over_group     | mean               | identity           | auxiliary losses of a mean over all tokens         |
| split_to_group      | own slice          | all-gather         | tokens before an MoE layer under tp                |
| gather_from_group   | all-gather         | own slice          | tokens after it                                    |
| gather_sequence     | all-gather         | reduce-scatter     | sequence parallelism: into a tensor-parallel region |
| scatter_sequence    | reduce-scatter     | all-gather         | sequence parallelism: out of it                    |

(Megatron-LM, arXiv 1909.08053, section 3; sequence parallelism, arXiv 2205.05198, section 4.2.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.parallel.mesh import Group

# torch 2.13 renamed these two and warns about the old names; older releases have only those.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` in place over the group and return it. Not differentiable."""
    if group.size > 1:
        group.note("all_reduce")
        dist.all_reduce(x, op=op, group=group.process_group)
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n, ...] on each rank -> [size * n, ...] on all, in rank order. Not differentiable."""
    if group.size == 1:
        return x
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    group.note("all_gather")
    _all_gather(out, x.contiguous(), group=group.process_group)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[size * n, ...] on each rank -> the sum's own slice [n, ...]. Not differentiable."""
    if group.size == 1:
        return x
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    group.note("reduce_scatter")
    _reduce_scatter(out, x.contiguous(), group=group.process_group)
    return out


def own_slice(x: Tensor, group: Group) -> Tensor:
    """This rank's slice of dim 0. Raises ValueError when the group's size does not divide it."""
    if group.size == 1:
        return x
    if x.shape[0] % group.size:
        raise ValueError(f"{x.shape[0]} tokens cannot be cut into {group.size} equal slices, one for each tp rank")
    return x.chunk(group.size, dim=0)[group.rank]


def exchange_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """All-to-all of rows: the first send[0] rows go to rank 0, and so on. Zero counts are fine, skipping is not.

    x: [sum(send), ...] -> [sum(receive), ...]. Not differentiable.
    """
    return start_exchange(x, send, receive, group).wait()


@dataclass
class Pending:
    """An exchange under way. It keeps what it reads and writes until `wait`, which gives the rows received."""

    rows: Tensor
    sent: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None
        return self.rows


def start_exchange(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, out: Tensor | None = None
) -> Pending:
    """`exchange_rows` that returns at once. All ranks must start their exchanges in the same order. `out`: contiguous,
    to receive into."""
    if group.size == 1:
        return Pending(x if out is None else out.copy_(x))
    x = x.contiguous()
    out = x.new_empty(sum(receive), *x.shape[1:]) if out is None else out
    group.note("all_to_all")
    work = dist.all_to_all_single(out, x, list(receive), list(send), group=group.process_group, async_op=True)
    return Pending(out, x, work)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _MeanOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group) / group.size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SplitToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return own_slice(x, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group), None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own_slice(grad, ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group), None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Identity; the gradient is summed over the group."""
    return _CopyToGroup.apply(x, group) if group.size > 1 else x


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Sum over the group; the gradient passes unchanged."""
    return _ReduceFromGroup.apply(x, group) if group.size > 1 else x


def mean_over_group(x: Tensor, group: Group) -> Tensor:
    """Mean over the group; the gradient passes unchanged. For a loss that is a function of a mean over all ranks and
    whose own gradients are averaged over them: each rank then adds what its own term of the mean contributes."""
    return _MeanOverGroup.apply(x, group) if group.size > 1 else x


def split_to_group(x: Tensor, group: Group) -> Tensor:
    """Replicated [n, ...] -> own slice [n / size, ...]; the gradient slices are gathered."""
    return _SplitToGroup.apply(x, group) if group.size > 1 else x


def gather_from_group(x: Tensor, group: Group) -> Tensor:
    """Slices [n, ...] -> replicated [size * n, ...]; each rank takes its slice of the (replicated) gradient."""
    return _GatherFromGroup.apply(x, group) if group.size > 1 else x


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """Slices -> full; each rank's gradient is a partial sum, so it is reduce-scattered."""
    return _GatherSequence.apply(x, group) if group.size > 1 else x


def scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Partial sums -> own slice of the sum; the gradient slices are gathered."""
    return _ScatterSequence.apply(x, group) if group.size > 1 else x
