"""Parameters that training leaves as they are, by patterns over their logical names: `train.freeze`.

    train: {freeze: ["embedding.*", "blocks.*.attention.*", "blocks.0.*"]}

A frozen parameter asks for no gradient (`requires_grad` is false, which is all that engines look at): it is in no
bucket, in no norm and in no optimizer, and keeps its bits. Gradients still pass through it to what lies before it, so
that the others learn as if it were a constant. Names are logical, the same in every layout, so patterns are too; where
a matrix has two names, as with tied embeddings, either of them freezes it.

A router's balancing bias is no parameter, but moves with every step. A pattern that matches its name
(`blocks.0.feed_forward.router.bias_E`) keeps it where it is as well.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from moe_dist.moe.router import Router
from moe_dist.parallel.sharding import spec_of

_SHOWN = 4


@dataclass(frozen=True)
class Frozen:
    """What is frozen. names: of parameters. biases: of balancing biases. also: other names of tied parameters. elements
    of `total`: numbers of the logical model."""

    names: tuple[str, ...]
    biases: tuple[str, ...]
    also: tuple[str, ...]
    elements: int
    total: int

    def describe(self) -> str:
        count, share = len(self.names), self.elements / self.total
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        told = f"{count} parameters, {share:.1%} of all numbers, stay: {', '.join(self.names[:_SHOWN])}{more}"
        if self.also:
            told += f"; tied, so the same as {', '.join(self.also)}"
        if self.biases:
            told += f"; and {len(self.biases)} balancing biases"
        return told + "; FLOPs and MFU count their gradients all the same"


def freeze(model: nn.Module, patterns: Sequence[str]) -> Frozen | None:
    """Before an engine takes the model; None where there are no patterns.

    Raises ValueError for a pattern that matches nothing, naming what is near it, and where nothing is left to train.
    """
    if not patterns:
        return None
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name)
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
    biases = {f"{name}.bias_E": router for name, router in routers if getattr(router, "bias_E", None) is not None}
    known = [name for own in names.values() for name in own] + list(biases)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(_nothing(pattern, known))
    frozen = [param for param, own in names.items() if any(matches(name, patterns) for name in own)]
    if len(frozen) == len(names):
        raise nothing_left(patterns, len(names))
    still = [name for name in biases if matches(name, patterns)]
    for param in frozen:
        param.requires_grad_(False)
    for name in still:
        biases[name].still = True
    sizes = {param: prod(spec_of(param).logical_shape) for param in names}
    return Frozen(
        names=tuple(names[param][0] for param in frozen),
        biases=tuple(still),
        also=tuple(name for param in frozen for name in names[param][1:]),
        elements=sum(sizes[param] for param in frozen),
        total=sum(sizes.values()),
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def nothing_left(patterns: Sequence[str], count: int) -> ValueError:
    said = f"train.freeze={list(patterns)} leaves nothing to train: all {count} parameters match; name fewer"
    return ValueError(said)


def _nothing(pattern: str, known: Sequence[str]) -> str:
    below = f"{pattern.rstrip('.*')}."
    if any(name.startswith(below) for name in known):
        near = [f"{below}*"]
    else:
        near = get_close_matches(pattern, known, n=3, cutoff=0.4)
    advice = f"did you mean {', '.join(near)}" if near else f"names are like {known[0]} and {known[-1]}"
    return f"train.freeze: {pattern!r} matches no parameter; {advice}? `moe-dist checkpoint inspect RUN` lists all"
