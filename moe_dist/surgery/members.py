"""A layer's experts taken apart and put together again, and what surgery/layers.py may not do to them.

Legend: E experts, F hidden units of one, D d_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.schema import ParallelConfig
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.sharding import initialize, logical_parameters

if TYPE_CHECKING:
    from moe_dist.moe.layer import MoE

_NAMES = ("w_gate", "w_up", "w_out", "b_gate", "b_up", "b_out")  # in the order of ExpertWeights


@dataclass(frozen=True)
class Member:
    """One expert and all that belongs to it: its weights, [F, D], [F] or [D], and its row of all the router holds."""

    weights: ExpertWeights
    row: dict[str, Tensor]

    @property
    def width(self) -> int:
        return self.weights.up.shape[0]


def members_of(layer: "MoE") -> list[Member]:
    held, count = layer.experts, layer.config.num_experts

    def each(name: str) -> Sequence[Tensor | None]:
        value = getattr(held, name)
        if value is None:
            return [None] * count
        by_expert = held.uniform or name == "b_out"
        return value.detach().unbind(0) if by_expert else value.detach().split(list(held.widths))

    weights = [ExpertWeights(*own) for own in zip(*map(each, _NAMES), strict=True)]  # type: ignore[arg-type]
    return [Member(own, {name: v.detach()[i] for name, v in _per_expert(layer)}) for i, own in enumerate(weights)]


def _per_expert(layer: "MoE") -> Iterator[tuple[str, Tensor]]:
    """All that the router holds: it has a row for each expert."""
    yield from chain(layer.router.named_parameters(), layer.router.named_buffers())


def rebuild(layer: "MoE", members: list[Member], **changes: Any) -> None:
    """Give `layer` these experts. Router and experts are made as for a new layer, so that specs are right."""
    fresh = layer_like(layer, [member.width for member in members], **changes)
    for field, name in enumerate(_NAMES):
        old, new = getattr(layer.experts, name), getattr(fresh.experts, name)
        if new is not None:
            values = [member.weights[field] for member in members]
            join = torch.stack if fresh.experts.uniform or name == "b_out" else torch.cat
            new.data = join(values)  # type: ignore[arg-type]
            new.requires_grad_(old.requires_grad)
    for (name, new), (_, old) in zip(_per_expert(fresh), _per_expert(layer), strict=True):
        new.data = torch.stack([member.row[name] for member in members])
        new.requires_grad_(old.requires_grad)
    for part in ("config", "gate", "router", "dispatcher", "experts"):
        setattr(layer, part, getattr(fresh, part))
    layer.train(layer.training)


def layer_like(layer: "MoE", widths: list[int], **changes: Any) -> "MoE":
    """A new layer with experts of these widths, otherwise as `layer`. Raises ValueError where a rule is broken."""
    moe = layer.config
    d_ff: int | list[int] | None = widths if len(set(widths)) > 1 or isinstance(moe.d_ff, list) else widths[0]
    if moe.d_ff is None and d_ff == layer.d_ff:
        d_ff = None
    moe = replace(moe, num_experts=len(widths), d_ff=d_ff, **changes)
    # What counts the layers of a model is as it was.
    alone = replace(moe, every=1, first=None, capacity_factor=1.0, eval_capacity_factor=None, capacity_schedule={})
    refuse(moe_rules(alone, ParallelConfig(), d_ff=layer.d_ff, num_layers=1))
    held = layer.experts
    return type(layer)(
        moe,
        held.d_model,
        layer.d_ff,
        held.activation,
        layer=layer.layer,
        mesh=layer.mesh,
        kernels=held.kernels,
        recompute=held.recompute,
        out_std=held.out_std,
    )


def random_members(layer: "MoE", members: list[Member], widths: list[int], seed: int, name: str) -> list[Member]:
    """The last experts of a new layer, in the precision and on the device of these."""
    before = [member.width for member in members]
    fresh = layer_like(layer, before + widths, num_groups=groups_of(layer, len(before) + len(widths)))
    initialize(fresh, seed, name)

    def like(value: Tensor | None, old: Tensor | None) -> Tensor | None:
        return None if value is None or old is None else value.to(old)

    def as_here(new: Member) -> Member:
        weights = ExpertWeights(*map(like, new.weights, members[0].weights))  # type: ignore[arg-type]
        return Member(weights, {key: value.to(members[0].row[key]) for key, value in new.row.items()})

    return [as_here(new) for new in members_of(fresh)[len(before) :]]


def moved(row: dict[str, Tensor], noise: float, key: RandomKey) -> dict[str, Tensor]:
    """A copy of a router row with normal noise on what multiplies the input, relative to its root mean square."""
    if noise == 0.0 or "weight" not in row:
        return dict(row)
    weight_D = row["weight"]
    size = weight_D.double().square().mean().sqrt()
    normal_D = key.normal(torch.arange(weight_D.numel(), device=weight_D.device))
    return row | {"weight": (weight_D + noise * size * normal_D).to(weight_D.dtype)}


def mean_of(members: list[Member], share: Tensor, origin: list[int]) -> Member:
    """Weighted mean, taken as what others differ by from the first: equal ones give themselves, to the bit."""
    if len(members) == 1:
        return members[0]
    if float(share.sum()) <= 0.0:
        raise ValueError(f"weights of group {origin} are all 0: give one of its experts a weight, or leave them out")
    first, parts = members[0], (share.double() / share.double().sum()).tolist()
    if len({float(member.row["open_E"]) for member in members}) > 1:
        raise ValueError(
            f"group {origin} has open and closed experts: open or close all of it, or remove the closed ones"
        )
    if len({member.width for member in members}) > 1:
        raise ValueError(f"group {origin} has experts of different widths; merge those of one width")

    def mean(values: Sequence[Tensor | None]) -> Tensor | None:
        base = values[0]
        if base is None or not base.is_floating_point():
            return base  # a name
        away = [part * (v.double() - base.double()) for part, v in zip(parts, values, strict=True) if v is not None]
        return (base.double() + torch.stack(away).sum(0)).to(base.dtype)

    weights = ExpertWeights(*map(mean, zip(*(m.weights for m in members), strict=True)))  # type: ignore[arg-type]
    row = {name: mean([member.row[name] for member in members]) for name in first.row}
    return Member(weights, row)  # type: ignore[arg-type]


def parts_of(member: Member, parts: int, scale: int) -> list[Member]:
    """An expert cut by hidden units: `scale` times a part each. The output's bias is shared out."""

    def cut(value: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * parts if value is None else value.chunk(parts)

    w = member.weights
    bias = None if w.out_bias is None else w.out_bias * (scale / parts)
    each = zip(*map(cut, (w.gate, w.up, w.out * scale, w.gate_bias, w.up_bias)), strict=True)
    return [Member(ExpertWeights._make([*own, bias]), dict(member.row)) for own in each]


def open_experts_of(layer: "MoE") -> list[int]:
    open_e = layer.router.open_ids()
    return list(range(layer.config.num_experts)) if open_e is None else open_e.tolist()


def groups_of(layer: "MoE", num_experts: int) -> int:
    """num_groups for that many experts: groups keep their size."""
    moe = layer.config
    return 1 if moe.num_groups == 1 else num_experts * moe.num_groups // moe.num_experts


def check_known(layer: "MoE", ids: Sequence[int]) -> None:
    count = layer.config.num_experts
    if len(ids) == 0:
        raise ValueError(f"no expert named: give numbers from 0 to {count - 1}")
    unknown = [index for index in ids if not 0 <= index < count]
    if unknown or len(set(ids)) < len(ids):
        what = f"unknown {unknown}" if unknown else "one twice"
        raise ValueError(f"experts {list(ids)} name {what}: give different numbers from 0 to {count - 1}")


def check_left(layer: "MoE", left: Sequence[int], doing: str, ids: Sequence[int]) -> None:
    """Every token must find top_k open experts, within top_k_groups groups."""
    moe = layer.config
    size = moe.num_experts // moe.num_groups
    few_groups = moe.num_groups > 1 and len(left) < moe.top_k_groups * size
    if len(left) < moe.top_k or few_groups:
        groups = f" in top_k_groups={moe.top_k_groups} groups of {size}" if moe.num_groups > 1 else ""
        raise ValueError(
            f"{doing} {list(ids)} leaves {len(left)} open experts, but top_k={moe.top_k}{groups}: "
            "name fewer, or open others first"
        )


def check_groups(layer: "MoE", ids: Sequence[int], what: str) -> None:
    """A group is open or closed as a whole, else groups of the open experts would have different sizes."""
    moe = layer.config
    size = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and any((index // size * size + i) not in set(ids) for index in ids for i in range(size)):
        raise ValueError(
            f"experts {sorted(ids)} cannot be {what} alone with num_groups={moe.num_groups}: "
            f"name whole groups of {size} neighbours"
        )


def check_whole(layer: "MoE") -> None:
    """All experts must be here, in parameters that nobody else holds a part of."""
    for name, param, spec in chain(logical_parameters(layer.router), logical_parameters(layer.experts)):
        if param.numel() != prod(spec.logical_shape):
            raise ValueError(
                f"{name} holds {param.numel()} of {prod(spec.logical_shape)} numbers on this rank "
                f"(ep={layer.mesh.ep.size}, or ZeRO 3): gather the model on one process first, by loading its "
                "checkpoint there with ep=1"
            )
        if hasattr(param, "_hp_mapping"):  # set by DeepSpeed's ZeRO 1 and 2 and its bf16 optimizer
            raise ValueError(
                f"{name} belongs to a ZeRO optimizer that would go on with the old experts: save a checkpoint, change "
                "the experts in a model of one process without an engine, and start from that"
            )
