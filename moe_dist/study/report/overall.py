"""What a value that is compared changes over all settings of the other axes together: the mean over the settings of its
paired differences, seed by seed. A difference that each setting shows too weakly may show here."""

from collections.abc import Sequence
from statistics import fmean

from scipy import stats

from moe_dist.study.page.model import Table, Value
from moe_dist.study.report.matches import Match
from moe_dist.study.report.metric import difference_form, title
from moe_dist.study.statistics.paired import pair
from moe_dist.study.statistics.samples import FEWEST_SEEDS, t_interval


def overall_table(matches: Sequence[Match], metric: str) -> Table | None:
    """One row for each value that was compared in several settings; None where none was."""
    by_value: dict[tuple[str, str], list[Match]] = {}
    for match in matches:
        by_value.setdefault((match.short, match.baseline_short), []).append(match)
    rows: list[list[Value]] = []
    for (short, baseline), members in by_value.items():
        means = mean_differences(members, metric)
        if len(members) < 2 or not means:
            continue
        interval, p = t_interval(means), None
        if interval is not None and interval.low < interval.high:
            p = float(stats.ttest_1samp(means, 0.0).pvalue)
        ends: list[Value] = [None, None] if interval is None else [interval.low, interval.high]
        rows.append([short, baseline, len(members), len(means), fmean(means), *ends, p])
    if not rows:
        return None
    columns = ["point", "baseline", "settings", "seeds", "minus baseline", "low", "high", "p"]
    form = difference_form(*(value for match in matches for value in match.cell.values(metric)))
    return Table(
        name="overall",
        title="Over all settings together",
        columns=columns,
        rows=rows,
        formats=dict.fromkeys(columns[4:7], form) | {"p": ".3g"},
        note=(
            f"{title(metric)} minus the baseline, of each seed the mean over the settings, with a 95% t interval over "
            f"seeds (from {FEWEST_SEEDS} on) and its p, of this comparison alone. Each setting has the same weight; "
            "another grid would be another mean."
        ),
    )


def mean_differences(matches: Sequence[Match], metric: str) -> list[float]:
    """Over `matches`, of each seed that has a pair in all of them."""
    pairs = [pair(match.cell.by_seed(metric), match.baseline.by_seed(metric)).differences for match in matches]
    seeds = [seed for seed in pairs[0] if all(seed in each for each in pairs)]
    return [fmean(each[seed] for each in pairs) for seed in seeds]
