"""Changing the experts of a trained layer: add, open, close, split, remove, merge. Functions on one MoE layer.

A *closed* expert takes no part: its router logit is -inf, and routing, noise, losses and capacity are to the bit those
of a layer without it (moe/gate.py). New experts come closed and are opened when wanted, so adding them changes
nothing, and neither does removing closed ones. What else is preserved:

| operation                | outputs                                                                             |
|--------------------------|-------------------------------------------------------------------------------------|
| add, remove closed       | the same bits, in training and evaluation, with every router                        |
| remove one that is open, | equal up to rounding where weights do not depend on it: softmax over the chosen     |
| but never chosen         | (renormalize, top_k > 1), sigmoid, hash; other softmax weights grow by 1 / (1 - p)  |
| open a clone (noise=0)   | up to rounding with sigmoid at top_k = 1. Else not: it takes a share of softmax,    |
|                          | and at top_k > 1 both are chosen                                                    |
| open a hashed expert     | only the tokens that are its now change                                             |
| split all                | equal up to rounding                                                                |
| merge clones             | up to rounding with sigmoid at top_k = 1, and for tokens with renormalised weights  |
|                          | that chose not more than one of them. Else not                                      |

All of this is about the same tokens being kept: C = ceil(capacity_factor * top_k * tokens / num_experts) counts open
experts, so opening lowers it and removing open ones raises it; expert choice, which is made of C, changes with it.

The layer changes in place, but its parameters, router and experts are new objects: an optimizer or engine that holds
the old ones must be built again. Gradients of closed experts are zero; weight decay still acts on them.

Legend: E experts, F hidden units of one, D d_model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.surgery.members import (
    Member,
    check_groups,
    check_known,
    check_left,
    check_whole,
    groups_of,
    mean_of,
    members_of,
    moved,
    open_experts_of,
    parts_of,
    random_members,
    rebuild,
)

if TYPE_CHECKING:
    from moe_dist.moe.layer import MoE

Init = Literal["clone", "random", "split"]


@torch.no_grad()
def add_experts(
    layer: "MoE",
    n: int,
    init: Init = "clone",
    *,
    sources: Sequence[int] | None = None,
    load_E: Tensor | None = None,
    noise: float = 0.01,
    d_ff: int | None = None,
    seed: int = 0,
    name: str = "",
) -> list[int]:
    """Append `n` closed experts; returns their numbers, for `open_experts`. Outputs stay the same to the bit.

    clone: copies of `sources`, or of the most loaded by `load_E` (assignments of each expert, MoEStats.load_E), or of
    the first. `noise` moves the copies' router rows, relative to their size: equal logits go to the lower number, so
    that an exact clone (noise=0) takes no token from its source. random: what a model built with as many experts from
    `seed` starts with, where `name` is the layer's within it ("blocks.1.feed_forward."); `d_ff`: their width, if
    another. split: `split_experts`, which opens what it makes; n must be a multiple of num_experts.
    With num_groups > 1 experts come as whole groups, so that those of before keep theirs.
    """
    check_whole(layer)
    moe, members = layer.config, members_of(layer)
    count = len(members)
    if n < 1:
        raise ValueError(f"n={n} experts to add is below 1")
    if init == "split":
        if n % count:
            raise ValueError(
                f"init=split cuts every expert: n={n} must be a multiple of num_experts={count}; one expert alone "
                "cannot be cut and stay the same, the router may choose one part without the other: use init=clone"
            )
        split_experts(layer, 1 + n // count)
        return [index for index in range(count + n) if index % (1 + n // count)]
    if moe.num_groups > 1 and n % (count // moe.num_groups):
        raise ValueError(
            f"n={n} with num_groups={moe.num_groups} must be whole groups of {count // moe.num_groups} experts"
        )
    if init == "clone":
        if d_ff is not None:
            raise ValueError(f"d_ff={d_ff}: clones have the width of their sources; use init=random")
        origin = [members[source] for source in _sources(layer, n, sources, load_E)]
        keys = [RandomKey.of(seed, name, layer.layer, count + new) for new in range(n)]
        added = [Member(old.weights, moved(old.row, noise, key)) for old, key in zip(origin, keys, strict=True)]
    elif init == "random":
        added = random_members(layer, members, [_width(layer, d_ff)] * n, seed, name)
    else:
        raise ValueError(f"unknown init {init!r}: choose clone, random or split")
    for member in added:
        member.row["open_E"] = torch.zeros_like(member.row["open_E"])
    if moe.router == "hash":
        last = torch.stack([member.row["names_E"] for member in members]).max()
        for new, member in enumerate(added):
            member.row["names_E"] = last + 1 + new
    rebuild(layer, members + added, num_groups=groups_of(layer, count + n))
    return list(range(count, count + n))


def open_experts(layer: "MoE", ids: Sequence[int]) -> None:
    """Let tokens go to closed experts. From here on they take part in everything, see the table above."""
    _set_open(layer, ids, 1.0)


def close_experts(layer: "MoE", ids: Sequence[int]) -> None:
    """No token goes to these experts any more. Those left must be enough for top_k (and top_k_groups)."""
    check_known(layer, ids)
    check_left(layer, [i for i in open_experts_of(layer) if i not in set(ids)], "closing", ids)
    _set_open(layer, ids, 0.0)


@torch.no_grad()
def remove_experts(layer: "MoE", ids: Sequence[int]) -> list[int]:
    """Take experts out; the others move up. Returns the former numbers of those that stay, in their new order."""
    check_whole(layer)
    check_known(layer, ids)
    check_left(layer, [i for i in open_experts_of(layer) if i not in set(ids)], "removing", ids)
    check_groups(layer, ids, "removed")
    members = members_of(layer)
    stay = [index for index in range(len(members)) if index not in set(ids)]
    rebuild(layer, [members[index] for index in stay], num_groups=groups_of(layer, len(stay)))
    return stay


@torch.no_grad()
def merge_experts(
    layer: "MoE", groups: Sequence[Sequence[int]], weights: Tensor | Sequence[float] | None = None
) -> list[list[int]]:
    """Each group of experts becomes one, in the place of its lowest number: the mean of their weights, router rows and
    balancing biases, weighted by `weights` [E] (their load, say) if given. A hash router's keeps the lowest one's name.
    Returns the former numbers of each expert, in the new order.
    """
    check_whole(layer)
    members, moe = members_of(layer), layer.config
    check_known(layer, [index for group in groups for index in group])
    if alone := [group for group in groups if len(group) < 2]:
        raise ValueError(f"a group of {list(alone[0])}: two experts or more become one")
    if moe.num_groups > 1:
        raise ValueError(
            f"num_groups={moe.num_groups}: merging would leave groups of different sizes; remove whole groups"
        )
    share_E = torch.ones(len(members)) if weights is None else torch.as_tensor(weights).cpu()
    if share_E.shape != (len(members),) or bool((share_E < 0).any()):
        raise ValueError(f"weights {share_E.tolist()} must be {len(members)} numbers of 0 or more, one for each expert")
    gone = {index for group in groups for index in sorted(group)[1:]}
    opened = [index for index in open_experts_of(layer) if index not in gone]
    check_left(layer, opened, "merging", sorted(gone))
    whole = {min(group): sorted(group) for group in groups}
    came_from = [whole.get(index, [index]) for index in range(len(members)) if index not in gone]
    rebuild(layer, [mean_of([members[i] for i in origin], share_E[origin], origin) for origin in came_from])
    return came_from


@torch.no_grad()
def split_experts(layer: "MoE", parts: int = 2) -> None:
    """Cut every expert into `parts` of a part of its hidden units each, and choose `parts` times as many (fine-grained
    experts, DeepSeekMoE, arXiv 2401.06066, section 3.1). Expert i becomes i * parts, ..., i * parts + parts - 1.

    The parts of an expert have its router row, so they are chosen together, each with 1 / parts of its softmax weight;
    their outputs are multiplied to make up for it, and the layer computes what it did. C stays. Not the same: z-loss
    and entropy (logsumexp and entropy grow by log parts), drop_policy=random (each part draws its own), router=noisy in
    training (likewise).
    """
    check_whole(layer)
    moe = layer.config
    widths = {member.width for member in members_of(layer)}
    if parts < 2 or any(width % parts for width in widths):
        raise ValueError(f"parts={parts} must be 2 or more and divide the experts' width, d_ff={sorted(widths)}")
    if moe.router == "hash" or (moe.router in ("noisy", "sinkhorn") and moe.top_k == 1):
        raise ValueError(
            f"router={moe.router} with top_k={moe.top_k} would not give the parts of an expert its weight; "
            "grow the layer with init=clone or random"
        )
    if moe.router == "sigmoid" and moe.num_groups > 1:
        raise ValueError(
            f"num_groups={moe.num_groups}: router=sigmoid ranks groups by two experts, which parts would fill"
        )
    # What it was for one chosen expert it must be for its parts; expert_choice never looks at it.
    renormalize = moe.renormalizes or (moe.renormalize and moe.router == "expert_choice")
    scale = split_scale(moe, parts)
    # A width of their own stays that of the shared experts; else they become as narrow as the others.
    shared = moe.num_shared_experts * (parts if moe.shared_d_ff is None else 1)
    members = members_of(layer)
    if moe.router == "softmax" and "bias_E" in members[0].row:  # beside scores that are shared out
        members = [replace(own, row=own.row | {"bias_E": own.row["bias_E"] / parts}) for own in members]
    rebuild(
        layer,
        [part for member in members for part in parts_of(member, parts, scale)],
        top_k=moe.top_k * parts,
        renormalize=renormalize,
        renormalize_top_1=False,
        num_shared_experts=shared,
    )


def split_scale(moe: MoEConfig, parts: int) -> int:
    """What `split_experts` multiplies the outputs of parts by: as many times less is each part's weight."""
    return 1 if moe.router == "sigmoid" and not moe.renormalizes else parts


def _sources(layer: "MoE", n: int, sources: Sequence[int] | None, load_E: Tensor | None) -> list[int]:
    """Whom to clone, one for each of `n`; fewer than n are taken in turn."""
    count = layer.config.num_experts
    if sources is not None and load_E is not None:
        raise ValueError("sources and load_E both say whom to clone: give one of them")
    if load_E is not None:
        if load_E.shape != (count,):
            raise ValueError(
                f"load_E has shape {tuple(load_E.shape)} for num_experts={count}: give one number for each"
            )
        sources = load_E.argsort(descending=True, stable=True)[:n].tolist()
    elif sources is None:
        sources = range(min(n, count))
    check_known(layer, list(dict.fromkeys(sources)))
    if len(sources) > n:
        raise ValueError(f"{len(sources)} sources {list(sources)} for n={n} new experts: raise n or name fewer")
    return [sources[new % len(sources)] for new in range(n)]


def _width(layer: "MoE", d_ff: int | None) -> int:
    if d_ff is None and not layer.experts.uniform:
        raise ValueError(f"experts have widths {sorted(set(layer.experts.widths))}: give d_ff of the new ones")
    if d_ff is not None and d_ff < 1:
        raise ValueError(f"d_ff={d_ff} is below 1")
    return d_ff or layer.experts.widths[0]


@torch.no_grad()
def _set_open(layer: "MoE", ids: Sequence[int], value: float) -> None:
    check_known(layer, ids)
    check_groups(layer, ids, "opened" if value else "closed")
    layer.router.open_E[list(ids)] = value
