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

from collections.abc import Callable, Sequence
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
        with group.entering("all_reduce", x):
            dist.all_reduce(x, op=op, group=group.process_group)
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n, ...] on each rank -> [size * n, ...] on all, in rank order. Not differentiable."""
    if group.size == 1:
        return x
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    with group.entering("all_gather", x):
        _all_gather(out, x.contiguous(), group=group.process_group)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[size * n, ...] on each rank -> the sum's own slice [n, ...]. Not differentiable."""
    if group.size == 1:
        return x
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    with group.entering("reduce_scatter", x):
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
    group: Group | None = None

    def wait(self) -> Tensor:
        if self.work is not None and self.group is not None:
            with self.group.waiting():
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
    group.note("all_to_all", x)
    sizes = (list(receive), list(send))
    if torch.compiler.is_compiling():  # a compiled graph orders its exchanges itself
        dist.all_to_all_single(out, x, *sizes, group=group.process_group)
        return Pending(out)
    work = dist.all_to_all_single(out, x, *sizes, group=group.process_group, async_op=True)
    return Pending(out, x, work, group)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.backward_of = backward
        return forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_inputs = ctx.backward_of(*grads)
        return None, None, *(of_inputs if isinstance(of_inputs, tuple) else (of_inputs,))


def graph_node(forward: Callable[..., Any], backward: Callable[..., Any], *inputs: Tensor) -> Any:
    """forward(*inputs), as one node of autograd's graph: new tensors or views of inputs, one or a tuple of them.
    `backward` is given the gradient of each, and returns that of each input; of several, a tuple."""
    return _WithGradient.apply(forward, backward, *inputs)


def with_gradient(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """forward(x), a new tensor or a view of x, whose gradient is carried back by `backward`."""
    y: Tensor = graph_node(forward, backward, x)
    return y


@dataclass(frozen=True)
class _Pair:
    """What a group does to a tensor on the way forward and to its gradient on the way back; a group of one, nothing."""

    forward: Callable[[Tensor, Group], Tensor]
    backward: Callable[[Tensor, Group], Tensor]

    def __call__(self, x: Tensor, group: Group) -> Tensor:
        if group.size == 1:
            return x
        return with_gradient(x, lambda x: self.forward(x, group), lambda grad: self.backward(grad, group))


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), group)


def _mean(x: Tensor, group: Group) -> Tensor:
    return _sum(x, group) / group.size


def _own_copy(x: Tensor, group: Group) -> Tensor:
    return own_slice(x, group).clone()


# The table above, as functions of (x, group).
copy_to_group = _Pair(_same, _sum)
"""Identity; the gradient is summed over the group."""
reduce_from_group = _Pair(_sum, _same)
"""Sum over the group; the gradient passes unchanged."""
mean_over_group = _Pair(_mean, _same)
"""Mean over the group; the gradient passes unchanged. For a loss that is a function of a mean over all ranks and whose
own gradients are averaged over them: each rank then adds what its own term of the mean contributes."""
split_to_group = _Pair(_own_copy, all_gather)
"""Replicated [n, ...] -> own slice [n / size, ...]; the gradient slices are gathered."""
gather_from_group = _Pair(all_gather, own_slice)
"""Slices [n, ...] -> replicated [size * n, ...]; each rank takes its slice of the (replicated) gradient."""
gather_sequence = _Pair(all_gather, reduce_scatter)
"""Slices -> full; each rank's gradient is a partial sum, so it is reduce-scattered."""
scatter_sequence = _Pair(reduce_scatter, all_gather)
"""Partial sums -> own slice of the sum; the gradient slices are gathered."""
