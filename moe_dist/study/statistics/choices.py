"""How many of a token's top_k distinct choices fall into a pool of experts, when only the experts' shares are known.

Shares do not say which experts are chosen together. Of all distributions over sets of k experts with the same
inclusion probabilities p_e, the one of greatest entropy is conditional Bernoulli sampling (Chen, Dempster and Liu,
"Weighted finite population sampling to maximize entropy", Biometrika 81, 1994): each set S of k experts has the
probability

    prod_{e in S} w_e / R(k, all),    R(j, A) = sum over the sets S of j experts of A of prod_{e in S} w_e

with weights w_e such that p_e = w_e R(k - 1, all but e) / R(k, all). Equal shares make it uniform choice without
repetition, so that counts in a pool are hypergeometric. R(j, A) is the coefficient of x^j in prod_{e in A} (1 + w_e x).

Legend: E experts, P pools of n neighbours, J = top_k + 1 coefficients or counts.
"""

import numpy as np

from moe_dist.study.statistics.samples import Floats

_SURE = 1e-9  # an expert that so few tokens pass over is taken for one that all choose
_CLOSE = 1e-8
_ROUNDS = 500


def choices_in_pools(chosen_E: Floats, top_k: int, pool: int) -> Floats:
    """[P, J]: the probability that a token makes 0, 1, ... top_k of its choices in each pool.

    chosen_E: p_e, the probability that a token chooses expert e: between 0 and 1, in sum top_k. An expert with p_e = 1
    is a choice of every token, and the others share what is left.
    """
    certain_E = chosen_E > 1 - _SURE
    free = top_k - int(certain_E.sum())
    weights_E = np.zeros_like(chosen_E)
    if free:
        left_E = chosen_E[~certain_E] * (free / chosen_E[~certain_E].sum())
        weights_E[~certain_E] = _weights(np.minimum(left_E, 1 - _SURE), free)
    members_PnJ = _linear(weights_E, free).reshape(-1, pool, free + 1)
    pools_PJ = np.ones((len(members_PnJ), 1)) * (np.arange(free + 1) == 0)
    for member_PJ in members_PnJ.swapaxes(0, 1):
        pools_PJ = _product(pools_PJ, member_PJ)
    counts_PJ = pools_PJ * _others(pools_PJ)[:, ::-1]
    counts_PJ /= counts_PJ.sum(1, keepdims=True)
    certain_P = certain_E.reshape(-1, pool).sum(1)
    shifted_PJ = np.zeros((len(counts_PJ), top_k + 1))
    for row, (counts_J, sure) in enumerate(zip(counts_PJ, certain_P, strict=True)):
        shifted_PJ[row, sure : sure + free + 1] = counts_J
    return shifted_PJ


def _weights(chosen_E: Floats, top_k: int) -> Floats:
    """w_e, by repeating w_e <- sqrt(w_e p_e / (1 - p_e) R(k, all but e) / R(k - 1, all but e)).

    Without the root, which is the mean on a logarithmic scale with the weights of before, a round overshoots by up to
    what it had to go, and two experts change places for ever; with it every round at least halves the distance.
    """
    odds_E = chosen_E / (1 - chosen_E)
    weights_E = odds_E
    for _ in range(_ROUNDS):
        weights_E = weights_E * (top_k / weights_E.sum())  # their scale is free
        others_EJ = _others(_linear(weights_E, top_k))
        ratio_E = others_EJ[:, top_k] / others_EJ[:, top_k - 1]
        found_E = weights_E / (weights_E + ratio_E)
        if np.abs(found_E - chosen_E).max() < _CLOSE:
            return weights_E
        weights_E = np.sqrt(weights_E * odds_E * ratio_E)
    raise ValueError(
        f"no weights were found for {len(chosen_E)} experts of which a token chooses {top_k}, the most popular with "
        f"probability {chosen_E.max():.9f}: average the shares over more steps"
    )


def _linear(weights_E: Floats, top_k: int) -> Floats:
    """[E, J]: 1 + w_e x."""
    factors_EJ = np.zeros((len(weights_E), top_k + 1))
    factors_EJ[:, 0] = 1
    if top_k:
        factors_EJ[:, 1] = weights_E
    return factors_EJ


def _product(left_QJ: Floats, right_QJ: Floats) -> Floats:
    """Of polynomials, row by row, up to x^top_k."""
    size = left_QJ.shape[1]
    product_QJ = np.zeros_like(right_QJ)
    for power in range(size):
        product_QJ[:, power:] += left_QJ[:, power, None] * right_QJ[:, : size - power]
    return product_QJ


def _others(factors_QJ: Floats) -> Floats:
    """[Q, J]: for each polynomial the product of all others, up to x^top_k; no division, so nothing cancels.

    Pairs of pairs upwards, then each gets what its parent got times its sibling. Of four a, b, c, d:

        upwards      ab cd         a's parent ab has got cd
        downwards    a: cd * b     b: cd * a     c: ab * d     d: ab * c
    """
    count, size = factors_QJ.shape
    one_J = np.eye(1, size)
    levels = [np.concatenate([factors_QJ, np.repeat(one_J, (1 << (count - 1).bit_length()) - count, axis=0)])]
    while len(levels[-1]) > 1:
        levels.append(_product(levels[-1][0::2], levels[-1][1::2]))
    others_QJ = one_J
    for level_QJ in reversed(levels[:-1]):
        sibling_QJ = level_QJ.reshape(-1, 2, size)[:, ::-1].reshape(-1, size)
        others_QJ = _product(np.repeat(others_QJ, 2, axis=0), sibling_QJ)
    return others_QJ[:count]
