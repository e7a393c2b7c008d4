"""`moe-dist experts RUN list`: the experts of each layer, which are closed, starved, or alike.

Starved: fewer than a tenth (`--starved`) of the assignments that would be its even share among the open experts.
Alike: the cosine of the angle between all weights of two experts is at least 0.99 (`--alike`); that of two experts that
began at random is about 0, of copies 1. The order of hidden units, which means nothing, is not seen through.

Legend: E experts, N numbers of one expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_dist.moe.layer import MoE
from moe_dist.surgery.members import members_of


def describe_layer(layer: MoE, load: list[int] | None, starved: float, alike: float) -> Iterator[str]:
    """A line for the layer, one for its starved experts, one for each group of experts that are alike. load:
    assignments of each expert, if they are known."""
    moe = layer.config
    closed = layer.router.open_E.eq(0).nonzero().flatten().tolist()
    widths = "/".join(map(str, sorted(set(layer.experts.widths))))
    words = [f"layer {layer.layer}: {moe.num_experts} experts of width {widths}, top {moe.top_k}"]
    words.append(f"closed {listed(closed)}" if closed else "all open")
    known = load if load is not None and len(load) == moe.num_experts and any(load) else None
    if known is not None:
        words.append("load " + " ".join(f"{value / sum(known):.1%}" for value in known))
    yield "; ".join(words)
    if known is not None and (few := starved_experts(known, closed, starved)):
        even = 1 / (moe.num_experts - len(closed))
        shares = ", ".join(f"{index} ({known[index] / sum(known):.2%})" for index in few)
        yield f"  starved: {shares}; an even share is {even:.2%}"
    for group, least in alike_experts(layer, alike):
        yield f"  alike: {listed(group)}, cosine {least:.4f} or more"


def starved_experts(load: list[int], closed: list[int], share: float) -> list[int]:
    """Open experts with less than `share` of an even share."""
    opened = [index for index in range(len(load)) if index not in set(closed)]
    even = sum(load) / max(len(opened), 1)
    return [index for index in opened if load[index] < share * even]


def alike_experts(layer: MoE, least: float) -> list[tuple[list[int], float]]:
    """(experts that follow from one another by cosines of at least `least`, the smallest of those) of each group."""
    weights = [torch.cat([w.flatten() for w in member.weights if w is not None]) for member in members_of(layer)]
    found = []
    for size in sorted({len(weight) for weight in weights}):
        ids = [index for index, weight in enumerate(weights) if len(weight) == size]
        cosine_EE = _cosines(torch.stack([weights[index] for index in ids]))
        left = list(range(len(ids)))
        while left:
            group, edges = [left.pop(0)], []
            for member in group:
                near = [other for other in left if float(cosine_EE[member, other]) >= least]
                edges += [float(cosine_EE[member, other]) for other in near]
                group += near
                left = [other for other in left if other not in near]
            if edges:
                found.append((sorted(ids[member] for member in group), min(edges)))
    return sorted(found)


def _cosines(weights_EN: Tensor) -> Tensor:
    unit_EN = torch.nn.functional.normalize(weights_EN.float(), dim=1)
    return (unit_EN @ unit_EN.t()).clamp(-1.0, 1.0)


def listed(numbers: list[int]) -> str:
    """Runs of neighbours short: [0, 1, 2, 3, 7] is "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
