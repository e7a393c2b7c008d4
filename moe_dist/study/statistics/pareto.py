"""Which points nothing cheaper beats, and which capacity factor to recommend.

cost is time, FLOPs, bytes or memory: one number of a point, taken as known, but for times, which were measured: those
that differ by less than `same_cost` are equal. Losses have the noise of their seeds, so a point stands

| standing     | when, among the points that cost no more than it                                          |
|--------------|-------------------------------------------------------------------------------------------|
| dominated    | the loss of one is told to be lower                                                       |
| inside noise | no loss is told to be lower, but that of one is not told to be higher either              |
| front        | the losses of all are told to be higher, or nothing costs as little                       |

by paired tests of all pairs with Holm (ties.py).

The recommended point is the cheapest whose loss is not worse than the best one's by both measures: told apart by paired
tests with Holm, and by a mean of more than the smallest difference that matters. Of points that cost the same (the
cheapest of them and those within same_cost of it) the one of lower mean loss counts as cheaper. Few seeds tell little
apart, so three numbers say how far to trust it: `shown`, the cheapest point that is shown not to be worse by as much as
matters (one-sided tests with Holm); the share of bootstrap draws of the seeds in which each point is the cheapest
within what matters of the draw's best, and of equally cheap ones the best; and the seeds. Draws are stretched about the
mean by sqrt(n / (n - 1)), which makes their variance that of a mean of n. The best of many points is partly the
luckiest; that makes the others look worse than they are, so the advice errs towards the dearer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from moe_dist.study.statistics.paired import Comparison, compare, holm, p_beyond
from moe_dist.study.statistics.samples import FEWEST_SEEDS, BySeed, check_finite, check_share, draws
from moe_dist.study.statistics.ties import groups


class Standing(StrEnum):
    FRONT = "front"
    INSIDE_NOISE = "inside noise"
    DOMINATED = "dominated"


@dataclass(frozen=True, slots=True)
class Candidate:
    """cost: in any unit that all share, more is worse. losses: nats, of each seed."""

    cost: float
    losses: BySeed


@dataclass(frozen=True, slots=True)
class Place:
    """Of one point. against: the points that dominate it, or that it is not told apart from, which cost no more."""

    name: str
    cost: float
    loss: float
    standing: Standing
    against: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """name: None with fewer than three seeds that all points have, as are best and shown. best: the lowest mean loss.
    chosen: by point, the share of draws. left_seeds: those that some point lacks. reasons: sentences."""

    name: str | None
    best: str | None
    shown: str | None
    chosen: dict[str, float]
    seeds: tuple[int, ...]
    left_seeds: tuple[int, ...]
    reasons: tuple[str, ...]


def pareto(points: Mapping[str, Candidate], *, same_cost: float = 0.0, alpha: float = 0.05) -> list[Place]:
    """The standing of each point, in their order. same_cost: relative; costs that differ by less are equal, for times
    that were measured. Raises ValueError for what is not finite, and points without losses."""
    _check(points)
    _check_same_cost(same_cost)
    apart = groups({name: point.losses for name, point in points.items()}, alpha=alpha).apart
    places = []
    for name, point in points.items():
        rivals = [
            other for other, rival in points.items() if other != name and rival.cost <= point.cost * (1 + same_cost)
        ]
        lower = tuple(other for other in rivals if (other, name) in apart)
        tied = tuple(other for other in rivals if (name, other) not in apart)
        standing = Standing.DOMINATED if lower else Standing.INSIDE_NOISE if tied else Standing.FRONT
        places.append(Place(name, point.cost, _mean(point.losses), standing, lower or tied))
    return places


def recommend(
    points: Mapping[str, Candidate],
    *,
    matters: float,
    same_cost: float = 0.0,
    alpha: float = 0.05,
    metric: str = "loss",
    sign: float = 1.0,
) -> Recommendation:
    """matters: the smallest difference of losses that matters, in nats. same_cost: as of `pareto`. metric, sign: for
    the reasons: what the losses are, and -1 where they are its negative, since more of it is better. Raises ValueError
    for what is not finite, no points, points without losses, and numbers out of range."""
    _check(points)
    check_share(alpha, "alpha")
    _check_same_cost(same_cost)
    if not points:
        raise ValueError("no point to recommend")
    if not (math.isfinite(matters) and matters > 0):
        raise ValueError(f"matters={matters}: the smallest difference that matters is more than 0")
    seeds = tuple(sorted(set.intersection(*(set(point.losses) for point in points.values()))))
    left = tuple(sorted(set().union(*(point.losses for point in points.values())).difference(seeds)))
    if len(seeds) < FEWEST_SEEDS:
        few = f"{len(seeds)} seeds are common to all points, and a recommendation needs {FEWEST_SEEDS}"
        return Recommendation(None, None, None, {}, seeds, left, (few,))
    losses = {name: {seed: point.losses[seed] for seed in seeds} for name, point in points.items()}
    best = min(losses, key=lambda name: _mean(losses[name]))
    family = compare({name: each for name, each in losses.items() if name != best}, losses[best], alpha=alpha)
    rivals = {each.name: each for each in family}
    not_worse = holm({name: _p_of_worse(each, matters) for name, each in rivals.items()})
    tiers = _tiers(points, losses, same_cost)
    by_cost = [each for tier in tiers for each in tier]
    name = next(each for each in by_cost if each == best or not _worse(rivals[each], matters, alpha))
    shown = next(each for each in by_cost if each == best or not_worse[each] <= alpha)
    chosen = _chosen(losses, tiers, matters)
    mates = next(tier for tier in tiers if name in tier)
    reasons = []
    for each in by_cost[: by_cost.index(name)]:
        cheaper = "costs the same, and is" if each in mates else "is cheaper, and"
        reasons.append(f"{each} {cheaper} worse than {best} by {rivals[each].mean:.3g}, p = {_p(rivals[each])}")
    better, most = ("lower", "lowest") if sign > 0 else ("higher", "highest")
    if name == best:
        reasons.append(f"{name} has the {most} {metric} of {len(points)} points, and nothing cheaper comes near it")
    else:
        reasons.append(
            f"{name} costs {points[name].cost / points[best].cost:.3g} times what {best} does, whose {metric} is "
            f"{most}, and its own differs by {sign * (rivals[name].mean or 0.0):+.3g}, p = {_p(rivals[name])}"
        )
    if after := mates[mates.index(name) + 1 :]:
        reasons.append(
            f"{' and '.join(after)} cost{'s' * (len(after) == 1)} the same, but {name} has the {better} {metric}"
        )
    if shown != name:
        reasons.append(f"{len(seeds)} seeds do not show that it is worse by less than {matters:g}; for {shown} they do")
    reasons.append(f"it is the cheapest within {matters:g} of the best in {chosen[name]:.0%} of bootstrap draws")
    return Recommendation(name, best, shown, chosen, seeds, left, tuple(reasons))


def _tiers(points: Mapping[str, Candidate], losses: Mapping[str, BySeed], same_cost: float) -> list[list[str]]:
    """Points that cost the same, from the cheapest; within a tier from the lowest mean loss."""
    tiers: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name].cost):
        if tiers and points[name].cost <= points[tiers[-1][0]].cost * (1 + same_cost):
            tiers[-1].append(name)
        else:
            tiers.append([name])
    return [sorted(tier, key=lambda name: _mean(losses[name])) for tier in tiers]


def _worse(rival: Comparison, matters: float, alpha: float) -> bool:
    assert rival.mean is not None and rival.p_holm is not None
    return rival.mean > matters and rival.p_holm <= alpha


def _p_of_worse(rival: Comparison, matters: float) -> float:
    """One-sided, of being worse by what matters or more."""
    return p_beyond([-each for each in rival.pairs.differences.values()], -matters)


def _p(rival: Comparison) -> str:
    return f"{rival.p_holm:.2g}"


def _chosen(losses: Mapping[str, BySeed], tiers: Sequence[Sequence[str]], matters: float) -> dict[str, float]:
    """By point, how often it is the cheapest within what matters of the best; of equally cheap ones the best."""
    names, tier_P = zip(*((name, number) for number, tier in enumerate(tiers) for name in tier), strict=True)
    values_NP = np.array([list(losses[name].values()) for name in names]).T
    count = len(values_NP)
    counts_DN, weights_D = draws(count)
    mean_P = values_NP.mean(0)
    means_DP = mean_P + (counts_DN @ (values_NP - mean_P) / count) * math.sqrt(count / (count - 1))
    tier_DP = np.where(means_DP <= means_DP.min(1, keepdims=True) + matters, tier_P, len(tiers))
    cheapest_DP = tier_DP == tier_DP.min(1, keepdims=True)
    shares = np.bincount(np.where(cheapest_DP, means_DP, np.inf).argmin(1), weights_D, len(names))
    return {name: float(shares[names.index(name)]) for name in losses}


def _mean(losses: BySeed) -> float:
    return float(np.mean(list(losses.values())))


def _check_same_cost(same_cost: float) -> None:
    if not 0 <= same_cost < 1:
        raise ValueError(f"same_cost={same_cost}: give the relative difference that does not count, 0 to 1")


def _check(points: Mapping[str, Candidate]) -> None:
    for name, point in points.items():
        check_finite(point.losses, name)
        if not point.losses:
            raise ValueError(f"{name} has no loss of any seed: leave it out and say so")
        if not (math.isfinite(point.cost) and point.cost > 0):
            raise ValueError(f"{name}: a cost of {point.cost} is none; give a number above 0")
