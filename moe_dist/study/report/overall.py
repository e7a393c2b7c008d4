"""What a value that is compared changes over all settings of the other axes together: the mean over the settings of its
paired differences. A difference that each setting shows too weakly may show here.

Two errors of that mean can be told. One from the means of the seeds: right also where a seed does the same to all
settings, but of as few numbers as there are seeds. One from the spread of seeds within each setting, with Welch and
Satterthwaite's degrees of freedom: of more numbers, but right only where settings share nothing. The wider interval of
the two is given, so that it covers the truth in 95 of 100 studies at least in either case.

Legend: S settings, N seeds.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from moe_dist.study.page.model import Table, Value
from moe_dist.study.report.matches import Match
from moe_dist.study.report.metric import difference_form, title
from moe_dist.study.statistics.paired import pair
from moe_dist.study.statistics.samples import FEWEST_SEEDS, Floats, Interval


def overall_table(matches: Sequence[Match], metric: str) -> Table | None:
    """One row for each value that was compared in several settings; None where none was."""
    by_value: dict[tuple[str, str], list[Match]] = {}
    for match in matches:
        by_value.setdefault((match.short, match.baseline_short), []).append(match)
    rows: list[list[Value]] = []
    for (short, baseline), members in by_value.items():
        difference_SN = differences(members, metric)
        if len(members) < 2 or not difference_SN.size:
            continue
        interval = wider_interval(difference_SN)
        ends: list[Value] = [None, None] if interval is None else [interval.low, interval.high]
        rows.append([short, baseline, *difference_SN.shape, float(difference_SN.mean()), *ends])
    if not rows:
        return None
    columns = ["point", "baseline", "settings", "seeds", "minus baseline", "low", "high"]
    form = difference_form(*(value for match in matches for value in match.cell.values(metric)))
    return Table(
        name="overall",
        title="Over all settings together",
        columns=columns,
        rows=rows,
        formats=dict.fromkeys(columns[4:], form),
        note=(
            f"{title(metric)} minus the baseline, the mean over settings and seeds, with a 95% interval of this "
            "comparison alone: the wider of that over the means of the seeds and that over seeds within settings. Each "
            "setting has the same weight; another grid would be another mean."
        ),
    )


def differences(matches: Sequence[Match], metric: str) -> Floats:
    """[S, N] of the seeds that have a pair in all of `matches`."""
    pairs = [pair(match.cell.by_seed(metric), match.baseline.by_seed(metric)).differences for match in matches]
    seeds = [seed for seed in pairs[0] if all(seed in each for each in pairs)]
    return np.array([[each[seed] for seed in seeds] for each in pairs], np.float64)


def wider_interval(difference_SN: Floats) -> Interval | None:
    """With 95%, of the mean; None of fewer than three seeds."""
    settings, seeds = difference_SN.shape
    if seeds < FEWEST_SEEDS:
        return None
    error_S = difference_SN.var(1, ddof=1) / (seeds * settings**2)
    within, shared = float(error_S.sum()), float(difference_SN.mean(0).var(ddof=1)) / seeds
    freedom = within**2 / float((error_S**2).sum()) * (seeds - 1) if within else 1.0
    reach = max(
        float(special.stdtrit(free, 0.975)) * math.sqrt(error)
        for free, error in ((seeds - 1, shared), (freedom, within))
    )
    mean = float(difference_SN.mean())
    return Interval(mean - reach, mean + reach)
