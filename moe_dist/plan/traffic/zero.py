"""What DeepSpeed 0.19 exchanges as engine/deepspeed.py sets it up, read off its source and counted in real steps.

| stage | gradients, in fp32               | weights                          | norm              |
|-------|----------------------------------|----------------------------------|-------------------|
| 0     | all-reduce, once a step          |                                  | ours              |
| 1     | all-reduce, once a step          | all-gather of new ones, a step   | one of each group |
| 2     | all-reduce, every micro-step     | the same                         | the same          |
| 3     | reduce-scatter, every micro-step | all-gather before use            | the same          |

Stages 1 and 2 reduce whole gradients, of which each rank keeps its part: on the wire they are stage 0. Dense parameters
are cut over dp, experts over edp. Gradients wait in a bucket until it is full; which ones share it is the order of the
backward pass. In bf16, stage 1 is another optimizer (`BF16_Optimizer`) with fewer norms, whose gradients lie end to
end, group by group, filled up to equal parts.

Stage 3 keeps a parameter between two uses when fewer than 1e9 elements are used in between: a small model gathers each
weight once a micro-step, a large one those of its early blocks twice, forward and backward. It gathers ahead, in calls
of 5e7 elements.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch

from moe_dist.config import Config
from moe_dist.engine.base import compute_dtype
from moe_dist.engine.exchange import zero_bucket
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.mesh import Axis
from moe_dist.plan.held import Param
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.transfer import Phase

_FP32, _FP64 = torch.float32.itemsize, torch.float64.itemsize
_WHOLE = 500_000_000  # elements of a call, where stage 0 and the optimizer of bf16 reduce at once
_AHEAD = 50_000_000  # stage3_prefetch_bucket_size
_REUSED = 1_000_000_000  # stage3_max_reuse_distance
_SUB_GROUP = 1_000_000_000  # sub_group_size, of a rank's part
_AXES: tuple[Axis, ...] = ("dp", "edp")  # over which parameters are cut
_ALIGNED = 2  # elements: nccl_start_alignment_factor


def zero_traffic(config: Config, held: list[Param], ledger: Ledger, each: Ledger) -> None:
    """Adds what DeepSpeed exchanges in one optimizer step, and to `each` what it does in every micro-step."""
    stage, low = config.engine.zero_stage, config.engine.precision == "bf16"
    if stage == 3:
        _stage_3(config, held, ledger, each)
        return
    groups = list(_optimizer_groups(held))
    whole = [(group[0], _part_of(group, ledger) * len(ledger.ranks(group[0].axis))) for group in groups]
    if stage == 0:
        _reduce_at_once([(param, param.numel) for param in held], ledger)
    elif stage == 1 and low:
        _reduce_at_once(whole, ledger)
    else:
        _reduce_in_buckets(held, zero_bucket(config.engine), each if stage == 2 else ledger)
    if stage == 0:
        for axis in ("tp", "ep"):
            ledger.add("all_reduce", axis, "update", "gradient norm", _FP64)
        return
    _finite_on_tp_ranks(ledger)
    _norms(groups, stage == 1 and low, stage == 2 and low, ledger)
    itemsize = compute_dtype(config.engine.precision).itemsize
    for group in groups:
        size = _part_of(group, ledger) * itemsize
        ledger.add("all_gather", group[0].axis, "update", "new weights", size)


def _part_of(group: Sequence[Param], ledger: Ledger) -> int:
    """Elements of a rank's part of an optimizer group under stages 1 and 2, with what fills it up."""
    ranks = len(ledger.ranks(group[0].axis))
    return -(-sum(param.numel for param in group) // (ranks * _ALIGNED)) * _ALIGNED


def _optimizer_groups(held: Sequence[Param]) -> Iterator[list[Param]]:
    """Parameters that are cut together, in the order of engine/deepspeed.py."""
    for decay in (True, False):
        for expert in (False, True):
            found = [param for param in held if (param.decay, param.expert) == (decay, expert)]
            if found:
                yield found


def _reduce_at_once(tensors: Sequence[tuple[Param, int]], ledger: Ledger) -> None:
    """Dense gradients, then those of experts; a call ends with the tensor that fills it. tensors: each with one of its
    parameters."""
    for expert in (False, True):
        waiting, sizes = 0, []
        for numel in (numel for param, numel in tensors if param.expert is expert):
            waiting += numel
            if waiting > _WHOLE:
                sizes.append(waiting)
                waiting = 0
        sizes += [waiting] if waiting else []
        ledger.add("all_reduce", "edp" if expert else "dp", "gradients", "gradients", sum(sizes) * _FP32, len(sizes))


def _reduce_in_buckets(held: Sequence[Param], room: int, ledger: Ledger) -> None:
    """One bucket for all gradients; when it is full, a call for each group in it."""
    keys = _groups(ledger)
    for bucket in _full(reversed(held), room):
        for params in _by_group(bucket, keys):
            size = sum(param.numel for param in params) * _FP32
            ledger.add("all_reduce", params[0].axis, "gradients", "gradients", size)


def _finite_on_tp_ranks(ledger: Ledger) -> None:
    if ledger.layout.tp > 1:
        ledger.add("all_reduce", "world", "update", "gradient norm", _FP64)


def _norms(groups: Sequence[Sequence[Param]], wrapped: bool, overflow: bool, ledger: Ledger) -> None:
    """Of stages 1 and 2. wrapped: BF16_Optimizer. overflow: whether it asks beforehand for what is not finite."""
    if wrapped:
        ledger.add("all_reduce", "tp", "update", "gradient norm", _FP32)
        if any(params[0].expert for params in groups):
            ledger.add("all_reduce", "ep", "update", "gradient norm", _FP32)
        return
    axes: tuple[Axis, ...] = ("dp", "tp")
    for axis in axes if overflow else ():
        ledger.add("all_reduce", axis, "update", "gradients that are not finite", 1)
    for params in groups:
        axes = ("dp", "tp", "edp") if params[0].expert else ("dp", "tp")
        for axis in axes:
            ledger.add("all_reduce", axis, "update", "gradient norm", _FP32)


def _stage_3(config: Config, held: Sequence[Param], ledger: Ledger, each: Ledger) -> None:
    model = config.model
    even = ledger.layout.expert_ranks == 1 or len(set(expert_widths(model.moe, model.d_ff))) <= 1
    kept = _kept_from(held, _REUSED if even else 0, runs=3 if model.recompute == "block" else 2)
    itemsize = compute_dtype(config.engine.precision).itemsize
    again = [param for param in held if param.block < kept]
    passes: list[tuple[Phase, Sequence[Param]]] = [("forward", held), ("backward", again)]
    keys, ranks = _groups(ledger), {axis: len(ledger.ranks(axis)) for axis in _AXES}
    for phase, params in passes:
        calls = -(-sum(param.numel for param in params) // _AHEAD)
        for group in _by_group(params, keys):
            size = sum(_parts(group, ranks)) * itemsize
            each.add("all_gather", group[0].axis, phase, "weights", size, min(calls, len(group)))
    for _, run in groupby(reversed(held), lambda param: keys[param.axis]):
        for bucket in _full(run, zero_bucket(config.engine)):
            size = sum(_parts(bucket, ranks)) * ranks[bucket[0].axis] * _FP32
            each.add("reduce_scatter", bucket[0].axis, "gradients", "gradients", size)
    _finite_on_tp_ranks(ledger)
    for params in _optimizer_groups(held):
        for _ in range(_sub_groups(_parts(params, ranks)) if even else 1):
            for axis in ("edp", "ep") if params[0].expert else ("dp", "tp"):
                ledger.add("all_reduce", axis, "update", "gradient norm", _FP64)


def _kept_from(held: Sequence[Param], distance: int, runs: int) -> int:
    """The first block that still lies there when backward comes to it. runs: of a block, forward and backward."""
    sizes: Counter[int] = Counter()
    for param in held:
        sizes[param.block] += param.numel
    blocks, used = max(sizes), 0
    for block in range(blocks, -2, -1):
        if used and used >= distance:
            return block + 1
        used += runs * sizes[block]
    return -1


def _groups(ledger: Ledger) -> dict[Axis, Axis]:
    """The axes over which parameters are cut, by name, where both have the same group by one name."""
    return {axis: ledger.same_group(axis) for axis in _AXES}


def _by_group(params: Sequence[Param], keys: dict[Axis, Axis]) -> Iterator[list[Param]]:
    found: dict[Axis, list[Param]] = {}
    for param in params:
        found.setdefault(keys[param.axis], []).append(param)
    yield from found.values()


def _parts(params: Sequence[Param], ranks: dict[Axis, int]) -> list[int]:
    """Elements that a rank keeps of each, padding included."""
    return [-(-param.numel // ranks[param.axis]) for param in params]


def _full(params: Iterable[Param], room: int) -> Iterator[list[Param]]:
    """Cut where a bucket is full."""
    bucket: list[Param] = []
    inside = 0
    for param in params:
        if bucket and inside + param.numel > room:
            yield bucket
            bucket, inside = [], 0
        bucket.append(param)
        inside += param.numel
    if bucket:
        yield bucket


def _sub_groups(sizes: Sequence[int]) -> int:
    """How many an optimizer group is cut into: one ends with the part that fills it."""
    if sum(sizes) <= _SUB_GROUP:
        return 1
    found, waiting = 0, 0
    for place, size in enumerate(sizes):
        waiting += size
        if waiting >= _SUB_GROUP or place == len(sizes) - 1:
            found, waiting = found + 1, 0
    return found
