"""From a micro-step's gradients to those of a step: accumulated in the masters, and summed over ranks during backward.

Parameters lie in buckets, the last layers' first, as backward comes to them; dense and expert ones apart, which have
other groups. A bucket leaves when its last gradient is there and the buckets before it have left, so that all ranks
send in the same order, whatever order gradients come in (PyTorch DDP, arXiv:2006.15704, section 4.2):

    backward     layer 3      layer 2      layer 1      embedding
    dense                 <0           <1           <2            <3  >0 >1 >2 >3

A group's buckets have a communicator of their own, so that it does not matter what else the ranks exchange meanwhile.
Dense gradients are averaged over dp; those of experts are summed over edp and divided by the full dp.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config.schema import EngineConfig
from moe_dist.parallel.mesh import Axis, Group, Mesh, own_communicator
from moe_dist.parallel.sharding import spec_of


class GradientExchange:
    """Fills the masters' .grad, in their precision.

    bucket_mib: how many MiB leave at a time; None: everything at once, after backward.
    """

    def __init__(self, masters: Mapping[nn.Parameter, Tensor], mesh: Mesh, bucket_mib: float | None) -> None:
        self.masters, self.dp, self.trail = masters, mesh.layout.dp, mesh.trail
        self.overlap = bucket_mib is not None
        self.first, self.last, self.missing = True, False, set[nn.Parameter]()
        by_axis: dict[Axis, list[nn.Parameter]] = {"dp": [], "edp": []}
        for param in masters:
            by_axis["edp" if spec_of(param).shard == "expert" else "dp"].append(param)
        self.queues = []
        for axis, params in by_axis.items():
            group: Group = getattr(mesh, axis)
            if params and group.size > 1:
                lots = buckets([masters[param].nbytes for param in params], bucket_mib)
                group = own_communicator(mesh, axis) if self.overlap else group
                self.queues.append(_Queue(group, [_Bucket([params[place] for place in lot]) for lot in lots]))
        self.queue_of = {param: queue for queue in self.queues for param in queue.bucket_of}
        for param in masters:
            param.register_post_accumulate_grad_hook(self._take)

    @contextmanager
    def of_micro_step(self, first: bool, last: bool) -> Iterator[None]:
        """Around the backward pass. After the last one of a step, gradients are the step's."""
        self.first, self.last, self.missing = first, last, set(self.masters)
        for queue in self.queues:
            queue.begin()
        yield
        for param in self.masters:
            if param in self.missing:  # experts that saw no token count as zero
                self._take(param)
        if last:
            self.trail.enter("gradients")
            self._finish()

    def clear(self) -> None:
        """Forget them, and give their memory back."""
        for master in self.masters.values():
            master.grad = None
        for queue in self.queues:
            queue.drop()

    @torch.no_grad()
    def _take(self, param: nn.Parameter) -> None:
        """Move .grad from the parameter to its master."""
        master, grad, queue = self.masters[param], param.grad, self.queue_of.get(param)
        if master.grad is None and queue is not None:
            master.grad = queue.place(param, master.dtype)
        if master.grad is None:
            master.grad = torch.zeros_like(master) if grad is None else grad.to(master.dtype)
        elif grad is not None and self.first:
            master.grad.copy_(grad)
        elif grad is not None:
            master.grad.add_(grad)
        elif self.first:
            master.grad.zero_()
        param.grad = None
        self.missing.discard(param)
        if queue is not None and self.last and self.overlap:
            queue.arrived(param)

    @torch.no_grad()
    def _finish(self) -> None:
        for queue in self.queues:
            queue.finish()
        if self.dp > 1:
            grads = [master.grad for master in self.masters.values() if master.grad is not None]
            torch._foreach_mul_(grads, 1.0 / self.dp)


@dataclass(eq=False)
class _Bucket:
    """flat: gradients of `params`, one after the other, each at its place; None between steps. left: how many are not
    there yet."""

    params: list[nn.Parameter]
    flat: Tensor | None = None
    places: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    left: int = 0
    work: dist.Work | None = None

    def make(self, dtype: torch.dtype) -> None:
        sizes = [param.numel() for param in self.params]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=self.params[0].device)
        self.places = dict(zip(self.params, self.flat.split(sizes), strict=True))

    def drop(self) -> None:
        self.flat, self.places = None, {}


class _Queue:
    """The buckets of one group, which leave in order; `gone` have left."""

    def __init__(self, group: Group, buckets: list[_Bucket]) -> None:
        self.group, self.buckets, self.gone = group, buckets, 0
        self.bucket_of = {param: bucket for bucket in buckets for param in bucket.params}

    def begin(self) -> None:
        self.gone = 0
        for bucket in self.buckets:
            bucket.left, bucket.work = len(bucket.params), None

    def place(self, param: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Where its gradient lies in its bucket."""
        bucket = self.bucket_of[param]
        if bucket.flat is None:
            bucket.make(dtype)
        return bucket.places[param].view_as(param)

    def arrived(self, param: nn.Parameter) -> None:
        self.bucket_of[param].left -= 1
        while self.gone < len(self.buckets) and self.buckets[self.gone].left == 0:
            self._send()

    def finish(self) -> None:
        while self.gone < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def drop(self) -> None:
        for bucket in self.buckets:
            bucket.drop()

    def _send(self) -> None:
        bucket = self.buckets[self.gone]
        self.gone += 1
        assert bucket.flat is not None, "its gradients lie in it"
        self.group.note("all_reduce", bucket.flat)
        bucket.work = dist.all_reduce(bucket.flat, group=self.group.process_group, async_op=True)


def buckets(sizes: Sequence[int], mib: float | None) -> list[list[int]]:
    """Which parameters leave together: places in `sizes` (bytes), from the last to the first, in lots that are full as
    soon as they reach `mib`. None: all in one.

    >>> buckets([2 * 2**20, 2**19, 2**20, 2**20], mib=1.5)
    [[3, 2], [1, 0]]
    """
    lots: list[list[int]] = [[]]
    for place in reversed(range(len(sizes))):
        if mib is not None and sum(sizes[each] for each in lots[-1]) >= mib * 2**20:
            lots.append([])
        lots[-1].append(place)
    return lots


def zero_bucket(engine: EngineConfig) -> int:
    """Gradients that ZeRO exchanges at a time, of fp32's size whatever theirs; without bucket_mib DeepSpeed's own."""
    return 500_000_000 if engine.bucket_mib is None else max(1, int(engine.bucket_mib * 2**20) // 4)
