"""What a loss is worth in compute: the law L(C) = L0 + A C^-a, fitted and tested.

The law of a ladder of model sizes (Hoffmann et al., arXiv 2203.15556, approach 3): the parameters minimize the Huber
loss (delta = 1e-3) of log L - log(L0 + A C^-a) over all runs, from several starts. In MINPACK's least squares a
residual r stands as sign(r) sqrt(2 delta |r| - delta^2) beyond delta, whose square is twice the Huber loss.

Intervals are percentiles of a bootstrap of residuals (Davison and Hinkley 1997, section 3.8). Residuals of log L are
split into the mean of each seed, which all sizes of a seed share, and the rest; both are scaled to the standard
deviation that their degrees of freedom give, drawn with repetition, added to the fit, and the law is fitted again.
Percentiles are stretched by t over z. Seeds are the unit: fewer than three give no interval. What no interval holds is
a law of another form: for that the largest size is held out, predicted and scored. Measured coverage of 95% intervals
with 6 sizes over a factor of 300 in compute, 120 to 150 ladders each:

| seeds | noise of a run, and shared by the sizes of a seed | exponent                      | largest size, held out |
|-------|---------------------------------------------------|-------------------------------|------------------------|
| 5     | 0.1%, 0.2%                                        | 95.0                          | 97.5                   |
| 3     | 0.1%, 0.2%                                        | 97.5                          | 99.2                   |
| 5     | 0.2%, none                                        | 85.8, 92.7, 94.0 (3 series)   | 93.3                   |
| 3     | 0.2%, none                                        | 94.2                          | 96.7                   |

Losses that fall by less than twice what those of a seed miss the law by, or over the smallest size alone, have no law:
what would be fitted is an exponent near 0 or far above 1, by which any loss is worth any compute. Such a ladder is
refused.

With a law, a loss L stands for the effective compute (A / (L - L0))^(1 / a); speed.py sets throughput beside it.

Legend: M runs, N seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from moe_dist.study.statistics.samples import (
    FEWEST_SEEDS,
    BySeed,
    Floats,
    Interval,
    check_finite,
)

_DELTA = 1e-3
_FALL = 2.0  # over the ladder, in standard deviations about the law
_STEEPEST = 3.0  # published exponents of compute are 0.05 to 0.5
_LARGEST = 700.0  # that exp makes a number of
_FLOORS = (0.05, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99)  # starts of L0, as shares of the lowest loss


@dataclass(frozen=True, slots=True)
class Rung:
    """One size of a ladder. compute: FLOPs, or any unit that all rungs share. losses: nats, of each seed."""

    compute: float
    losses: BySeed


@dataclass(frozen=True, slots=True)
class Law:
    """L(C) = floor + scale C^-exponent. floor: L0, in nats; scale: A, in nats at a compute of 1; exponent: a."""

    floor: float
    scale: float
    exponent: float

    def loss(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.exponent


@dataclass(frozen=True, slots=True)
class LawFit:
    """95% intervals of the law's three numbers, None with fewer than three seeds. residual: standard deviation of log
    L about the law. draws: the laws of the bootstrap. freedom: degrees of the residuals, runs less seeds less 2."""

    law: Law
    floor: Interval | None
    scale: Interval | None
    exponent: Interval | None
    residual: float
    sizes: int
    seeds: int
    draws: tuple[Law, ...]
    freedom: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The largest rung, predicted from the others. measured: its mean loss. interval: 95%, of the fit's error and the
    noise of a mean over the ladder's seeds, whose part that all sizes share is in both. inside: whether it holds what
    was measured. Both None with fewer than three seeds. error: measured over predicted, minus 1."""

    fit: LawFit
    compute: float
    measured: float
    predicted: float
    interval: Interval | None
    inside: bool | None
    error: float


def fit_law(ladder: Sequence[Rung], *, draws: int = 400) -> LawFit:
    """The law of a ladder of at least three sizes; with exactly three nothing tests its form.

    Raises ValueError for losses and compute that are not positive and finite, for a ladder that is too short, and for
    losses that do not fall as a law does.
    """
    return _fit(ladder, draws)[0]


def hold_out(ladder: Sequence[Rung], *, draws: int = 400) -> HeldOut:
    """Fits all rungs but the largest, and scores what that says of it. At least four sizes; errors as `fit_law`."""
    ladder = sorted(ladder, key=lambda rung: rung.compute)
    _check_ladder(ladder, fewest=4)
    largest = ladder[-1]
    fit, noise_D = _fit(ladder[:-1], draws)
    measured, predicted = float(np.mean(list(largest.losses.values()))), fit.law.loss(largest.compute)
    misses = [math.log(predicted / law.loss(largest.compute)) for law in fit.draws]
    drawn = [predicted * math.exp(miss + noise) for miss, noise in zip(misses, noise_D, strict=True)]
    interval = _percentiles(predicted, drawn, fit.freedom)
    inside = None if interval is None else measured in interval
    return HeldOut(fit, largest.compute, measured, predicted, interval, inside, measured / predicted - 1)


@dataclass(frozen=True, slots=True)
class _Noise:
    """Residuals to draw from: seeds_N what the sizes of a seed share, rest_M what is left."""

    seeds_N: Floats
    rest_M: Floats

    def draw(self, rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        """[sizes, seeds]"""
        return rng.choice(self.seeds_N, shape[1]) + rng.choice(self.rest_M, shape)


def _fit(ladder: Sequence[Rung], draws: int) -> tuple[LawFit, list[float]]:
    """(the law, for each of its draws the noise of log L of a further size: the mean over the same seeds)."""
    _check_ladder(ladder, fewest=3)
    seeds = sorted({seed for rung in ladder for seed in rung.losses})
    cells = [(size, seeds.index(seed)) for size, rung in enumerate(ladder) for seed in rung.losses]
    size_M, seed_M = map(np.array, zip(*cells, strict=True))
    log_sizes = np.log([rung.compute for rung in ladder])
    middle = float(log_sizes.mean())  # about it the exponent and the scale are nearly independent
    compute_M = log_sizes[size_M] - middle
    loss_M = np.log([loss for rung in ladder for loss in rung.losses.values()])
    best = min((_huber(start, compute_M, loss_M) for start in _starts(compute_M, loss_M)), key=lambda found: found[1])
    fitted_M = _log_loss(best[0], compute_M)
    residual_M = loss_M - fitted_M
    noise = _noise(residual_M, seed_M, len(seeds))
    _check_fall(float(np.ptp(fitted_M)), float(noise.rest_M.std()), math.exp(best[0][0]))
    laws, further = [], []
    if len(seeds) >= FEWEST_SEEDS:
        rng = np.random.default_rng(0)
        for _ in range(draws):
            drawn = noise.draw(rng, (len(ladder) + 1, len(seeds)))
            further.append(float(drawn[-1].mean()))
            again_M = fitted_M + drawn[size_M, seed_M]
            laws.append(_law(_huber(best[0], compute_M, again_M)[0], middle))
    spread = math.sqrt(float(residual_M @ residual_M) / max(1, len(cells) - 3))
    law, freedom = _law(best[0], middle), len(cells) - len(seeds) - 2
    fit = LawFit(
        law,
        floor=_percentiles(law.floor, [each.floor for each in laws], freedom),
        scale=_percentiles(law.scale, [each.scale for each in laws], freedom),
        exponent=_percentiles(law.exponent, [each.exponent for each in laws], freedom),
        residual=spread,
        sizes=len(ladder),
        seeds=len(seeds),
        draws=tuple(laws),
        freedom=freedom,
    )
    return fit, further


def _percentiles(value: float, drawn: Sequence[float], freedom: int) -> Interval | None:
    """The middle 95%, on a logarithmic scale stretched about the value by t over z, since residuals of few runs have
    shorter tails than what they stand for."""
    if not drawn:
        return None
    stretch = float(special.stdtrit(max(1, freedom), 0.975) / special.ndtri(0.975))
    with np.errstate(over="ignore"):  # a scale A may be beyond all numbers
        low, high = value * (np.quantile(drawn, [0.025, 0.975]) / value) ** stretch
    return Interval(float(low), float(high))


def _noise(residual_M: Floats, seed_M: Floats, seeds: int) -> _Noise:
    """Seeds' means with the variance that they have beyond that of a mean of the rest."""
    runs_N = np.bincount(seed_M, minlength=seeds)
    mean_N = np.bincount(seed_M, residual_M, seeds) / runs_N
    rest_M = residual_M - mean_N[seed_M]
    variance = float(rest_M @ rest_M) / max(1, len(rest_M) - seeds - 2)
    shared = max(0.0, float(mean_N.var(ddof=1)) - variance / float(runs_N.mean())) if seeds > 1 else 0.0
    return _Noise(_scaled(mean_N - mean_N.mean(), shared), _scaled(rest_M - rest_M.mean(), variance))


def _scaled(values: Floats, variance: float) -> Floats:
    spread = float(values.std())
    return values * (math.sqrt(variance) / spread) if spread > 0 else values


def _starts(compute_M: Floats, loss_M: Floats) -> list[Floats]:
    """For some floors L0, the line through log(L - L0)."""
    starts = []
    for share in _FLOORS:
        floor = share * math.exp(loss_M.min())
        slope, height = np.polyfit(compute_M, np.log(np.exp(loss_M) - floor), 1)
        starts.append(np.array([math.log(max(-slope, 1e-3)), height, math.log(floor)]))
    return starts


def _log_loss(at: Floats, compute_M: Floats) -> Floats:
    """at: log a, log A at the middle of the ladder, log L0."""
    return np.logaddexp(at[2], at[1] - np.exp(at[0]) * compute_M)


def _huber(start: Floats, compute_M: Floats, loss_M: Floats) -> tuple[Floats, float]:
    """(where the Huber loss is least, twice its value)."""

    def residuals(at: Floats) -> Floats:
        residual_M = loss_M - _log_loss(at, compute_M)
        size_M = np.abs(residual_M)
        beyond_M = np.sign(residual_M) * np.sqrt(np.maximum(0, _DELTA * (2 * size_M - _DELTA)))
        return np.where(size_M <= _DELTA, residual_M, beyond_M)

    def slopes(at: Floats) -> Floats:
        fitted_M = _log_loss(at, compute_M)
        power_M = np.exp(at[1] - np.exp(at[0]) * compute_M - fitted_M)
        size_M = np.abs(loss_M - fitted_M)
        less_M = _DELTA / np.sqrt(np.maximum(_DELTA**2, _DELTA * (2 * size_M - _DELTA)))
        return -less_M * np.stack([-power_M * np.exp(at[0]) * compute_M, power_M, 1 - power_M])

    with np.errstate(over="ignore", invalid="ignore"):  # where it tries an exponent that is far too large
        at, *_ = optimize.leastsq(residuals, start, Dfun=slopes, col_deriv=True, full_output=True)
    return at, float(np.square(residuals(at)).sum())


def _law(at: Floats, middle: float) -> Law:
    """A draw of the bootstrap may be so steep that its scale is no number: then its loss is L0 from the ladder's middle
    on, whatever the scale."""
    exponent = math.exp(at[0])
    return Law(math.exp(at[2]), math.exp(min(at[1] + exponent * middle, _LARGEST)), exponent)


def _check_fall(fall: float, spread: float, exponent: float) -> None:
    """fall: of log L by the law, from the smallest to the largest size. spread: of the runs about the law, but for what
    all sizes of a seed share."""
    if fall <= _FALL * spread:
        raise ValueError(
            f"losses fall by {fall:.2%} from the smallest to the largest size and lie {spread:.2%} about the law, so "
            "no law of compute can be told; take sizes further apart, or more seeds"
        )
    if exponent > _STEEPEST:
        raise ValueError(
            f"losses fall from the smallest size alone (by an exponent of {exponent:.3g}), so no law of compute can be "
            "told; take sizes further apart"
        )


def _check_ladder(ladder: Sequence[Rung], fewest: int) -> None:
    for rung in ladder:
        check_finite(rung.losses, f"compute {rung.compute:g}")
        if not (math.isfinite(rung.compute) and rung.compute > 0):
            raise ValueError(f"compute={rung.compute} has no logarithm: give FLOPs, more than 0")
        if not rung.losses or min(rung.losses.values()) <= 0:
            raise ValueError(f"compute {rung.compute:g}: a rung needs losses, all above 0; leave it out and say so")
    sizes = len({rung.compute for rung in ladder})
    if sizes < max(fewest, len(ladder)):
        raise ValueError(f"{sizes} different values of compute in {len(ladder)} rungs: at least {fewest} are needed")
