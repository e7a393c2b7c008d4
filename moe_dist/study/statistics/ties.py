"""Which points can be told apart: groups in order instead of a ranking.

All pairs are compared by seed (paired t tests, Holm over all pairs). Points that are not told apart are in one group,
and so are those that a chain of such pairs joins; any two points of different groups are told apart, the same way
round, so the groups have an order, and the points within one have none. Three points whose ends differ and whose middle
does not:

    0.5 against 1.0: told apart      0.5 and 0.75, 0.75 and 1.0: not      one group: 0.5, 0.75, 1.0

The pairs that are told apart stand in `apart`, so that a report can say that the ends differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moe_dist.study.statistics.paired import holm, p_of_zero, pair
from moe_dist.study.statistics.samples import FEWEST_SEEDS, BySeed, check_finite, check_share


@dataclass(frozen=True, slots=True)
class Groups:
    """groups: from the lowest values to the highest; names within a group are in the order in which they were given.
    apart: (lower, higher) of all pairs that are told apart. too_few: pairs with fewer than three common seeds, which
    count as not told apart."""

    groups: tuple[tuple[str, ...], ...]
    apart: frozenset[tuple[str, str]]
    too_few: tuple[tuple[str, str], ...]


def groups(points: Mapping[str, BySeed], *, alpha: float = 0.05) -> Groups:
    """alpha: how often any pair may be told apart that does not differ. Raises ValueError for a point without a value,
    and for values that are not finite."""
    check_share(alpha, "alpha")
    for name, values in points.items():
        check_finite(values, name)
        if not values:
            raise ValueError(f"{name} has no value of any seed: leave it out and say so")
    differences = {
        (one, other): list(pair(points[one], points[other], one).differences.values())
        for one, other in combinations(points, 2)
    }
    enough = {names: values for names, values in differences.items() if len(values) >= FEWEST_SEEDS}
    p = holm({names: p_of_zero(values) for names, values in enough.items()})
    apart = {names if np.mean(values) < 0 else names[::-1] for names, values in enough.items() if p[names] <= alpha}
    too_few = tuple(names for names in differences if names not in enough)
    return Groups(_in_order(list(points), apart), frozenset(apart), too_few)


def _in_order(names: list[str], apart: set[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Draw an arrow from a to b unless b is known to be lower. Points that reach each other along arrows are a group;
    of two groups only the lower reaches the higher, so the lowest reaches most."""
    reach = np.array([[(other, one) not in apart for other in names] for one in names])
    for _ in range(len(names).bit_length()):
        reach = reach @ reach
    groups = dict.fromkeys(tuple(np.flatnonzero(row & column)) for row, column in zip(reach, reach.T, strict=True))
    lowest_first = sorted(groups, key=lambda members: -int(reach[members[0]].sum()))
    return tuple(tuple(names[at] for at in members) for members in lowest_first)
