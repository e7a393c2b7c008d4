"""Whether copies that must be equal are: a digest of each parameter, compared between the ranks that hold a copy.

Dense parameters lie on every rank, or under tp on every data-parallel one, experts on their edp group. All of a copy's
arithmetic is the same on all of its ranks, so copies are equal to the last bit; a flipped bit, in memory or on a wire,
is not seen in any loss for long.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Axis, Layout, Mesh
from moe_dist.parallel.sharding import spec_of
from moe_dist.train.exit_codes import REPLICAS_DIFFER, EndRun

_CHUNK = 1 << 22  # elements hashed at once: their int64 copies take eight bytes each
_AXES: dict[str, Axis] = {"replicated": "world", "tensor": "dp", "expert": "edp"}
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # odd, as int64


def check_replicas(model: Trainable, mesh: Mesh, step: int) -> None:
    """Every rank must call. Raises EndRun on every rank when copies differ, naming parameters and ranks."""
    mine = {name: (shard, digest(values)) for name, shard, values in _held(model)}
    # First one number a rank and kind of copy; everything only when something is wrong.
    totals = {kind: sum(value for shard, value in mine.values() if shard == kind) for kind in _AXES}
    replies: list[Any] = [None] * mesh.layout.world
    mesh.world.note("comparison of copies")
    dist.all_gather_object(replies, totals)
    if all(
        len({replies[rank][kind] for rank in ranks}) == 1
        for kind, axis in _AXES.items()
        for ranks in mesh.layout.groups(axis)
    ):
        return
    dist.all_gather_object(replies, mine)
    raise EndRun(REPLICAS_DIFFER, f"after step {step}, {_describe(replies, mesh.layout)}")


@torch.no_grad()
def digest(values: Tensor) -> int:
    """64 bits of the raw bits of `values` and of where they are; any one bit changes it."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(-1).view(size)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        place = torch.arange(start, start + part.numel(), device=values.device)
        total += _mixed(part + place * _MULTIPLIERS[0]).sum()
    return int(total)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit words that spreads every bit over all (the finaliser of SplitMix64, shifts signed)."""
    x = (x ^ (x >> 30)) * _MULTIPLIERS[1]
    x = (x ^ (x >> 27)) * _MULTIPLIERS[2]
    return x ^ (x >> 31)


def _held(model: Trainable) -> Iterator[tuple[str, str, Tensor]]:
    for name, param in model.named_parameters():
        yield name, spec_of(param).shard, param.data
    for name, buffer in model.named_buffers():
        yield name, "replicated", buffer


def _describe(held: list[dict[str, tuple[str, int]]], layout: Layout) -> str:
    """Each set of copies once: where they differ, the ranks of the minority; all where there is no majority."""
    odd: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for rank, digests in enumerate(held):
        for name, (shard, _) in digests.items():
            ranks = layout.ranks(_AXES[shard], rank)
            copies = {r: held[r][name][1] for r in ranks}
            value, votes = Counter(copies.values()).most_common(1)[0]
            if rank != ranks[0] or votes == len(ranks):
                continue
            if 2 * votes > len(ranks):
                odd["differs from the others in", tuple(r for r in ranks if copies[r] != value)].append(name)
            else:
                odd["differ from each other in", ranks].append(name)
    return "; ".join(
        f"rank {' and '.join(map(str, ranks))} {what} {names[0]}"
        + (f" and {len(names) - 1} more parameters" if len(names) > 1 else "")
        for (what, ranks), names in odd.items()
    )
