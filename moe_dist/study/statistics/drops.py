"""Which drops chance alone explains: the expected drop rate of random routing, by exact sums.

Every token chooses top_k distinct experts, independently of the other tokens. A pool of n experts that was asked for L
rows keeps min(L, n C) of them, whatever `drop_policy`, `drop_order` and `pool_floor` say about whose they are; so

    expected share dropped = sum over pools of E[max(0, L - n C)] / (tokens top_k)

| experts are chosen with | pool 1: L is               | pools of n > 1, L is                                         |
|-------------------------|----------------------------|--------------------------------------------------------------|
| equal shares: chance    | Binomial(tokens, top_k/E)  | top_k = 1: Binomial(tokens, n / E); else a sum over tokens   |
|                         |                            | of hypergeometric counts                                     |
| measured shares s_e     | Binomial(tokens, top_k s_e)| top_k = 1: Binomial with the pool's share; else a sum of the |
|                         |                            | counts of choices.py: shares do not say which experts are    |
|                         |                            | chosen together, so of all answers the one of greatest       |
|                         |                            | entropy is taken                                             |

So a measured drop rate = chance + imbalance + rest, where imbalance is what the unequal shares add and rest is what
random routing does not explain: tokens of a batch that are alike, shares that change within the steps averaged over,
pools whose members are chosen together. `capacity` is C in rows, as the run recorded it or as
moe_dist.moe.capacity.expert_capacity computes it from the factor; `tokens` are those that compete for it: of the whole
micro-step under `capacity_scope: global`, of one rank under `local`. A pool as large as a rank's experts is a rank's
budget. Not covered, since there the loads say too little: `overflow: reroute`, expert choice, and closed experts.

Shares belong to many steps. Those of a single micro-step hold its own chance fluctuation, which then counts twice, as
imbalance: at 16 micro-steps that is a sixteenth of the chance variance of the loads.

All sums are in float64: rates are exact to about 1e-12 for 10^6 tokens, and to 1e-8 for unequal shares in pools.

Legend: E experts, P pools, J counts of a token's choices in a pool: 0 to top_k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moe_dist.study.statistics.choices import choices_in_pools
from moe_dist.study.statistics.samples import Floats


@dataclass(frozen=True, slots=True)
class ExpectedDrops:
    """rate: share of all assignments that is expected to be dropped. by_pool: share of each pool's own assignments, of
    each expert's where pools are of 1; a pool that nobody chooses drops nothing."""

    rate: float
    by_pool: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DropSplit:
    """measured = chance + imbalance + rest, all shares of the assignments."""

    measured: float
    chance: float
    imbalance: float
    rest: float


def uniform_drops(tokens: int, top_k: int, num_experts: int, capacity: int | None, pool: int = 1) -> ExpectedDrops:
    """The drops of uniform random routing: what is left under perfect balance.

    capacity: C, rows of one expert; None drops nothing. pool: experts that share pool * C rows.
    Raises ValueError for sizes that do not fit.
    """
    _check_sizes(tokens, top_k, num_experts, capacity, pool)
    counts_J = stats.hypergeom.pmf(np.arange(top_k + 1), num_experts, top_k, pool)
    over = 0.0 if capacity is None else _expected_over(tokens, counts_J, pool * capacity)
    pools = num_experts // pool
    rate = min(1.0, over * pools / (tokens * top_k))
    return ExpectedDrops(rate, (rate,) * pools)


def drops_of_shares(
    tokens: int, top_k: int, shares: Sequence[float], capacity: int | None, pool: int = 1
) -> ExpectedDrops:
    """The drops of random routing with the experts' own shares.

    shares: of each expert, its assignments before dropping over all assignments; in sum 1, each at most 1 / top_k. The
    other arguments as in `uniform_drops`. Raises ValueError for shares that cannot be those of distinct choices.
    """
    _check_sizes(tokens, top_k, len(shares), capacity, pool)
    chosen_E = _chosen(shares, top_k)
    chosen_P = chosen_E.reshape(-1, pool).sum(1)
    if capacity is None:
        return ExpectedDrops(0.0, (0.0,) * len(chosen_P))
    if pool == 1 or top_k == 1:
        over_P = _binomial_over(tokens, chosen_P, pool * capacity)
    else:
        counts_PJ = choices_in_pools(chosen_E, top_k, pool)
        over_P = np.array([_expected_over(tokens, counts_J, pool * capacity) for counts_J in counts_PJ])
    asked_P = tokens * chosen_P
    by_pool = np.divide(over_P, asked_P, out=np.zeros_like(over_P), where=asked_P > 0)
    return ExpectedDrops(float(over_P.sum() / (tokens * top_k)), tuple(map(float, by_pool)))


def split_drops(
    measured: float, tokens: int, top_k: int, shares: Sequence[float], capacity: int | None, pool: int = 1
) -> DropSplit:
    """A measured drop rate of one layer, split. measured: dropped over all assignments, 0 to 1, over the same steps as
    the shares. The other arguments as in `drops_of_shares`, whose errors it raises."""
    if not 0 <= measured <= 1:
        raise ValueError(f"a drop rate of {measured} is none: give the share of the assignments, 0 to 1")
    chance = uniform_drops(tokens, top_k, len(shares), capacity, pool).rate
    expected = drops_of_shares(tokens, top_k, shares, capacity, pool).rate
    return DropSplit(measured, chance, expected - chance, measured - expected)


def _binomial_over(tokens: int, chosen_P: Floats, limit: int) -> Floats:
    """E[max(0, L - limit)] of L ~ Binomial(tokens, p): tokens p P(L' >= limit) - limit P(L > limit), where L' is of one
    token less. Both terms are as small as the tail, so the difference keeps its digits."""
    after = stats.binom.sf(limit, tokens, chosen_P)
    return np.maximum(0, tokens * chosen_P * stats.binom.sf(limit - 1, tokens - 1, chosen_P) - limit * after)


def _expected_over(tokens: int, counts_J: Floats, limit: int) -> float:
    """E[max(0, L - limit)], where L is the sum of the counts of all tokens.

    The distribution of the sum is the power of the characteristic function, on a circle that is as large as the sum can
    be or as 12 standard deviations on both sides are (and 100 counts, for loads of few tokens): what lies outside
    weighs less than 1e-15 by Bernstein's inequality. Loads are told apart modulo the circle, around their mean.
    """
    values_J = np.arange(len(counts_J))
    if not counts_J[2:].any():
        return float(_binomial_over(tokens, counts_J[1:2], limit)[0])
    mean = float(counts_J @ values_J)
    deviation = math.sqrt(tokens * max(0.0, float(counts_J @ (values_J - mean) ** 2)))
    top_k = len(counts_J) - 1
    reach = math.ceil(12 * deviation + 100 * top_k)
    circle = min(top_k * tokens + 1, 2 * reach + 1)
    first = max(0, math.floor(tokens * mean) - reach) if circle == 2 * reach + 1 else 0
    padded = np.zeros(max(circle, top_k + 1))
    padded[: top_k + 1] = counts_J
    chance = np.fft.irfft(np.fft.rfft(padded) ** tokens, len(padded))
    loads = first + np.arange(len(padded))
    return float(np.maximum(0, loads - limit) @ np.maximum(0, chance[loads % len(padded)]))


def _chosen(shares: Sequence[float], top_k: int) -> Floats:
    """[E]: how probably a token chooses each expert."""
    shares_E = np.asarray(shares, dtype=np.float64)
    if not np.isfinite(shares_E).all() or (shares_E < 0).any():
        at = int(np.flatnonzero(~np.isfinite(shares_E) | (shares_E < 0))[0])
        raise ValueError(f"the share of expert {at} is {shares_E[at]}: shares are counts over their sum")
    if abs(shares_E.sum() - 1) > 1e-6:
        raise ValueError(f"the experts' shares sum to {shares_E.sum():.8f}, not 1: divide the counts by their sum")
    chosen_E = top_k * shares_E / shares_E.sum()
    if chosen_E.max() > 1 + 1e-6:
        raise ValueError(
            f"expert {int(chosen_E.argmax())} has a share of {shares_E.max():.6f}, and no more than 1 / top_k = "
            f"{1 / top_k:.6f} is possible where choices are distinct: count before dropping and before rerouting"
        )
    return np.minimum(chosen_E, 1.0)


def _check_sizes(tokens: int, top_k: int, num_experts: int, capacity: int | None, pool: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: drops need at least one token")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} of num_experts={num_experts}: choices are distinct, 1 to num_experts of them")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity={capacity}: give rows of an expert, or None for no limit")
    if pool < 1 or num_experts % pool:
        raise ValueError(f"pool={pool} does not divide num_experts={num_experts}")
