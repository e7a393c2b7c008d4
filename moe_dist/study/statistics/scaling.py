"""Loss in active parameters, experts and tokens, with the capacity factor beside, where the grid allows it.

    log(L - L0) = c + a log(active parameters) + b log(experts) + d log(tokens) + g(factor) + s(seed)

by ordinary least squares (statsmodels). g is 0 for the baseline's factor, so exp(g) - 1 is what a factor changes of the
reducible loss; s takes out what all points of a seed share, so that the intervals are those of pairs. The terms are the
main effects of the joint laws of Clark et al. (arXiv 2202.01169) and Ludziejewski et al. (arXiv 2502.05172), whose
products of logarithms need larger grids; L0 is given, from a ladder (exchange.py) or 0.

| the grid                                                    | what happens to the term                              |
|-------------------------------------------------------------|-------------------------------------------------------|
| one value                                                   | left out, with the reason                             |
| two values                                                  | an exponent between the two; a note says that nothing |
|                                                             | tests that it is a power law                          |
| follows from the other terms (R^2 of 0.99 or more)          | left out: the exponent of the others is of both       |
| fewer than three seeds                                      | exponents without intervals                           |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.regression.linear_model import OLS

from moe_dist.study.statistics.samples import FEWEST_SEEDS, Floats, Interval

_TERMS = ("active_parameters", "experts", "tokens")
_SAME = 0.99


@dataclass(frozen=True, slots=True)
class Observation:
    """One run. factor: its capacity factor, None where it is dropless. loss: nats."""

    active_parameters: float
    experts: float
    tokens: float
    factor: float | None
    seed: int
    loss: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """interval: 95%, None with fewer than three seeds."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Scaling:
    """exponents: of the terms that the grid allows, negative where more of it lowers the loss. factors: g of each
    factor but the baseline's. left_out: the other terms, and why. notes: what limits the rest. deviation: of the
    residuals of log(L - L0), over `degrees`."""

    exponents: dict[str, Estimate]
    factors: dict[float | None, Estimate]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    deviation: float
    degrees: int


def scaling(observations: Sequence[Observation], *, floor: float = 0.0, baseline: float | None = None) -> Scaling:
    """floor: L0 in nats. baseline: the factor that others are compared with, dropless by default.

    Raises ValueError for sizes and losses that have no logarithm, a baseline that no run has, and a grid with no more
    runs than terms.
    """
    _check(observations, floor)
    levels = list(dict.fromkeys(each.factor for each in observations))
    if baseline not in levels:
        raise ValueError(f"no run has the baseline's capacity factor {baseline}: name one of {levels}")
    others = [factor for factor in levels if factor != baseline]
    seeds = sorted({each.seed for each in observations})
    columns: dict[object, Floats] = {"one": np.ones(len(observations))}
    columns |= {("seed", seed): np.array([float(each.seed == seed) for each in observations]) for seed in seeds[1:]}
    columns |= {("factor", level): np.array([float(each.factor == level) for each in observations]) for level in others}
    left_out, notes = {}, []
    for term in _TERMS:
        values = [getattr(each, term) for each in observations]
        distinct, column = len(set(values)), np.log(values)
        if distinct == 1:
            left_out[term] = f"has one value, {values[0]:g}"
        elif (known := _explained(column, np.stack(list(columns.values()), axis=1))) >= _SAME:
            before = [name for name in columns if name in _TERMS] or ["the capacity factor or the seed"]
            left_out[term] = (
                f"follows from {' and '.join(map(str, before))} (R^2 = {known:.3f}), whose number is of both"
            )
        else:
            columns[term] = column
            if distinct == 2:
                notes.append(f"{term} has two values: nothing tests that its law is a power")
    design = np.stack(list(columns.values()), axis=1)
    degrees = len(design) - int(np.linalg.matrix_rank(design))
    if degrees < 1:
        raise ValueError(f"{len(design)} runs for {design.shape[1]} terms leave nothing to judge by: run more seeds")
    found = OLS(np.log([each.loss - floor for each in observations]), design).fit()
    limits = found.conf_int(0.05)
    estimates = {
        name: Estimate(float(value), Interval(float(low), float(high)) if len(seeds) >= FEWEST_SEEDS else None)
        for name, value, (low, high) in zip(columns, found.params, limits, strict=True)
    }
    if len(seeds) < FEWEST_SEEDS:
        notes.append(f"{len(seeds)} seeds give no intervals: {FEWEST_SEEDS} are needed")
    return Scaling(
        exponents={term: estimates[term] for term in _TERMS if term in estimates},
        factors={level: estimates["factor", level] for level in others},
        left_out=left_out,
        notes=tuple(notes),
        deviation=math.sqrt(found.mse_resid),
        degrees=degrees,
    )


def _explained(column: Floats, others: Floats) -> float:
    """R^2 of the column in the others, of which one is constant."""
    rest = column - others @ np.linalg.lstsq(others, column, rcond=None)[0]
    return 1 - float(rest @ rest) / float(np.square(column - column.mean()).sum())


def _check(observations: Sequence[Observation], floor: float) -> None:
    if not observations:
        raise ValueError("no run to fit")
    for each in observations:
        for term in _TERMS:
            value = getattr(each, term)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"seed {each.seed}, factor {each.factor}: {term}={value} has no logarithm")
        if not (math.isfinite(each.loss) and each.loss > floor):
            raise ValueError(
                f"seed {each.seed}, factor {each.factor}: a loss of {each.loss} is not above the floor L0 = {floor}"
            )
