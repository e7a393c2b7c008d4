"""Whether copies that must be equal are: a digest of each parameter, compared between the ranks that hold a copy.

Dense parameters lie on every rank, or under tp on every data-parallel one, experts on their edp group. All of a copy's
arithmetic is the same on all of its ranks, so copies are equal to the last bit; a flipped bit, in memory or on a wire,
is not seen in any loss for long. Which copy is wrong is told by the majority, else by the fp32 masters where they lie
apart from the weights (ZeRO, and bf16); two copies alone cannot tell.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.engine.base import Engine
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Axis, Layout
from moe_dist.parallel.objects import gather_json
from moe_dist.parallel.sharding import spec_of
from moe_dist.train.exit_codes import REPLICAS_DIFFER, EndRun

_CHUNK = 1 << 14  # elements hashed at once: their int64 copies stay in a core's cache, and no other core is woken
_ON_GPU = 256  # chunks at once, or starting kernels would take the time
_AXES: dict[str, Axis] = {"replicated": "world", "tensor": "dp", "expert": "edp"}
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # odd, as int64


def check_replicas(engine: Engine, step: int) -> None:
    """Every rank must call. Raises EndRun on every rank when copies differ, naming parameters and ranks."""
    mesh = engine.mesh
    mine = {name: (shard, digest(values)) for name, shard, values in _held(engine.model)}
    # First one number a rank and kind of copy; everything only when something is wrong.
    totals = {kind: sum(value for shard, value in mine.values() if shard == kind) for kind in _AXES}
    mesh.world.note("comparison of copies")
    replies = gather_json(totals)
    if all(
        len({replies[rank][kind] for rank in ranks}) == 1
        for kind, axis in _AXES.items()
        for ranks in mesh.layout.groups(axis)
    ):
        return
    copies, unlike = gather_json(mine), gather_json(sorted(_unlike_masters(engine)))
    raise EndRun(REPLICAS_DIFFER, f"after step {step}, {_describe(copies, unlike, mesh.layout)}")


@torch.no_grad()
def _unlike_masters(engine: Engine) -> set[str]:
    """Parameters of which this rank's copy is not what some rank's fp32 masters say."""
    params = dict(engine.model.named_parameters())
    masters = [
        (piece.name, piece.start, piece.values.numel(), digest(piece.values.to(params[piece.name].dtype)))
        for piece in engine.held("weight")
        if piece.name in params and not _same_memory(piece.values, params[piece.name])
    ]
    unlike = set()
    for name, start, length, expected in (master for reply in gather_json(masters) for master in reply):
        param = params[name].data.view(-1)
        first = start - spec_of(params[name]).flat_start
        if first >= 0 and first + length <= param.numel() and digest(param[first : first + length]) != expected:
            unlike.add(name)
    return unlike


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@torch.no_grad()
def digest(values: Tensor) -> int:
    """64 bits of the raw bits of `values` and of where they are; any one bit changes it."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(-1).view(size)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    chunk = _CHUNK * _ON_GPU if values.is_cuda else _CHUNK
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk].long()
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


def _describe(held: list[dict[str, tuple[str, int]]], unlike: list[list[str]], layout: Layout) -> str:
    """Each set of copies once: where they differ, the ranks that are wrong; all where that cannot be told.

    held, unlike: of each rank, its digests, and the parameters that are not what masters say.
    """
    odd: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for rank, digests in enumerate(held):
        for name, (shard, _) in digests.items():
            ranks = layout.ranks(_AXES[shard], rank)
            copies = {r: held[r][name][1] for r in ranks}
            value, votes = Counter(copies.values()).most_common(1)[0]
            if rank != ranks[0] or votes == len(ranks):
                continue
            wrong = tuple(r for r in ranks if name in unlike[r])
            if 2 * votes > len(ranks):  # a master that is wrong itself calls all others wrong
                odd[tuple(r for r in ranks if copies[r] != value), "unlike the other ranks in"].append(name)
            elif wrong and wrong != ranks:
                odd[wrong, "unlike the optimizer's masters in"].append(name)
            else:
                odd[ranks, "unlike each other, and which one is wrong cannot be told, in"].append(name)
    return "; ".join(
        " and ".join(f"rank {rank}" for rank in ranks)
        + f" {'is' if len(ranks) == 1 else 'are'} {what} {names[0]}"
        + (f" and {len(names) - 1} more parameters" if len(names) > 1 else "")
        for (ranks, what), names in odd.items()
    )
