"""How far two checkpoints are from each other, logical tensor by logical tensor, whatever layouts wrote them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_dist.checkpoint.reader import Reader


@dataclass(frozen=True)
class Difference:
    """largest: of absolute differences, by kind; nan where only one side is not a number. note: instead, why the two
    cannot be compared."""

    name: str
    largest: dict[str, float]
    note: str | None = None

    @property
    def equal(self) -> bool:
        return self.note is None and not any(self.largest.values())  # nan is true


def differences(first: Reader, second: Reader) -> Iterator[Difference]:
    """One for each logical parameter of either, in order; kinds that only one of them stores are left out."""
    here, there = first.manifest, second.manifest
    both = [kind for kind in here.kinds if kind in there.kinds]
    without = here.without_moments | there.without_moments
    for name in sorted(here.shapes.keys() | there.shapes.keys()):
        shapes = here.shapes.get(name), there.shapes.get(name)
        if shapes[0] != shapes[1]:
            yield Difference(name, {}, " and ".join("absent" if shape is None else str(shape) for shape in shapes))
            continue
        kinds = [kind for kind in both if kind == "weight" or name not in without]
        yield Difference(name, {kind: _largest(first, second, kind, name) for kind in kinds})


def _largest(first: Reader, second: Reader, kind: str, name: str) -> float:
    elements, largest = math.prod(first.manifest.shapes[name]), 0.0
    pairs = zip(first.stream(kind, name, 0, elements), second.stream(kind, name, 0, elements), strict=True)
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan())  # also infinities of one sign
        gap = torch.where(same, 0.0, (a.double() - b.double()).abs()).max().item()
        if math.isnan(gap):
            return gap
        largest = max(largest, gap)
    return largest
