"""How many rows the experts of a rank receive, on the average and when routing is skewed.

An even share is what every rank would get if all experts were asked for alike. Under a capacity limit no rank gets more
than the limit lets in; without one, nothing but the routing itself bounds it, and memory must be there for the fullest
rank. When nothing is known of a routing but that it must add up, every division of the rows among E experts is equally
likely. Then the share of a rank with E / w of them, one of w ranks, is Beta distributed, with the mean 1 / w and

    standard deviation / mean = sqrt((w - 1) / (E + 1))

and layers fall independently: over L of them, whose rows are there at once, that becomes sqrt(L) times smaller. Of w
ranks, one must not have more; so room is left for what each exceeds with a probability of 0.01 / w, by the normal
distribution. One expert's share exceeds x with the probability (1 - x)^(E - 1), so that of the fullest exceeds
1 - (0.01 / E)^(1 / (E - 1)) with 0.01 at most.

    Mixtral: 8 experts on 8 ranks, 32 layers       1.47 times the even share
    Qwen3: 128 experts on 8 ranks, 94 layers       1.07
    the same, blocks recomputed: one layer's rows  1.70

A trained router with a balancing loss is more even than that. Where it is known how uneven, say so: skew.
"""

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

from moe_dist.config.model import MoEConfig

_EXCEEDED = 0.01


@dataclass(frozen=True, slots=True)
class Rows:
    """Of one layer on one rank. asked: assignments of its tokens. sent: those that are kept. arrived: rows for its own
    experts. fullest: rows of the expert of this rank that has most."""

    asked: int
    sent: int
    arrived: int
    fullest: int


def skew_of(moe: MoEConfig, factor: float | None, expert_ranks: int, edp: int, layers: int = 1) -> float:
    """Rows of the fullest rank over an even share of those kept; at least 1. layers: whose rows are there at once."""
    if moe.num_experts == 0:
        return 1.0
    likely = 1.0
    if expert_ranks > 1:
        deviation = sqrt((expert_ranks - 1) / (moe.num_experts + 1) / max(1, layers))
        likely = 1 + NormalDist().inv_cdf(1 - _EXCEEDED / expert_ranks) * deviation
    return max(1.0, min(likely, _bound(moe, factor, expert_ranks, edp)))


def skew_of_expert(moe: MoEConfig, factor: float | None, edp: int) -> float:
    """Rows of the fullest expert over the mean."""
    experts = moe.num_experts
    if experts < 2:
        return 1.0
    likely = experts * (1 - (_EXCEEDED / experts) ** (1 / (experts - 1)))
    return max(1.0, min(likely, _bound(moe, factor, experts, edp)))


def rows_of(
    moe: MoEConfig, factor: float | None, tokens: int, expert_ranks: int, etp: int, skew: float, skew_of_one: float
) -> Rows:
    """tokens: that this rank routes. skew, skew_of_one: rows of this rank, and of its fullest expert, over the mean."""
    if moe.router == "expert_choice":
        asked = tokens * moe.num_experts
        sent = min(asked, ceil(tokens * moe.top_k * (factor or 1.0)))
    else:
        asked = tokens * moe.top_k
        sent = asked if factor is None else min(asked, ceil(asked * factor))
    local = max(1, moe.num_experts * etp // expert_ranks)
    arrived = ceil(sent * etp * skew)
    return Rows(asked * etp, sent * etp, arrived, min(arrived, ceil(sent * etp / local * max(skew, skew_of_one))))


def _bound(moe: MoEConfig, factor: float | None, parts: int, edp: int) -> float:
    """The most that one of `parts` equal parts of the experts can get, over an even share. A token sends a part as many
    assignments as it has experts; under a limit over the whole micro-step, one of edp copies can take what all may."""
    bound = min(float(parts), moe.num_experts / min(moe.top_k, moe.num_experts))
    if factor is not None:
        bound = min(bound, max(1.0, factor) * (edp if moe.capacity_scope == "global" else 1))
    return bound
