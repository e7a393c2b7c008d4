"""The question of a study and its answer in two sentences.

| sentence | says                                                                                                     |
|----------|----------------------------------------------------------------------------------------------------------|
| first    | of each comparison that the question names whether it is worse, better, equivalent or not distinguishable |
| second   | which point to take by the question's cost, with the share of bootstrap draws that take it               |

All named comparisons are one family (Holm), whatever settings they span. What is claimed is given with its own 95% t
interval, which a claim keeps clear of zero; where nothing can be told, the bound holds for all of them at once. Without
a question there is no claim. The numbers are those of statistics/paired.py and pareto.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.study.design.grid import Study
from moe_dist.study.design.study_file import Question
from moe_dist.study.ledger.cells import Cell
from moe_dist.study.report.costs import cost, same_cost
from moe_dist.study.report.matches import Families, Match, compared, families, settings_of
from moe_dist.study.report.metric import lower_is_better, title
from moe_dist.study.statistics.paired import Comparison, Verdict
from moe_dist.study.statistics.pareto import Candidate, Recommendation, recommend
from moe_dist.study.statistics.power import NoiseFloor, noise_floor
from moe_dist.study.statistics.samples import FEWEST_SEEDS
from moe_dist.study.statistics.ties import groups

_MANY = 6  # clauses that a sentence can hold
_TRUSTED = 0.5  # share of bootstrap draws below which nothing is recommended
_UNSURE = "less than half of the bootstrap draws agree on the cheapest point that is not worse"
HOW = """question:
  baseline: {model.moe.capacity_factor: null}
  smallest_difference: 0.01
  decide_by: time"""


@dataclass(frozen=True, slots=True)
class Advice:
    """For one setting; without a recommendation, why."""

    setting: str
    recommendation: Recommendation | None
    why_not: str = ""

    @property
    def taken(self) -> str | None:
        """The recommended point, where at least half of the draws agree."""
        found = self.recommendation
        if found is None or found.name is None or found.chosen[found.name] < _TRUSTED:
            return None
        return found.name

    @property
    def reasons(self) -> str:
        return self.why_not if self.recommendation is None else "; ".join(self.recommendation.reasons)


@dataclass(frozen=True, slots=True)
class Order:
    """Of one setting: points from the lowest values up, those in braces not told apart, and a sentence about it."""

    setting: str
    groups: str
    words: str


@dataclass(frozen=True, slots=True)
class Answer:
    """asked: the question in words. sentences: the answer. comparisons: those that the question names, in the order of
    families.named. orders: which points may be ranked. floor: of the metric over seeds. same_cost: relative difference
    of what the question decides by that does not count."""

    question: Question | None
    families: Families
    asked: str
    sentences: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    advice: tuple[Advice, ...]
    orders: tuple[Order, ...]
    floor: NoiseFloor | None
    same_cost: float = 0.0


def answer(study: Study, grid: Sequence[Cell]) -> Answer:
    question = study.file.question
    found = families(study, grid, question)
    metric = "validation_loss" if question is None else question.metric
    floor = noise_floor({str(number): cell.by_seed(metric) for number, cell in enumerate(grid)})
    if question is None:
        said = (
            "No question was stated before the runs, so nothing here is a claim: every comparison is exploratory.",
            "State one in the study's file, with a `question:` that names baseline, metric and the smallest difference "
            "that matters.",
        )
        return Answer(None, found, "", said, (), (), (), floor)
    asked = _asked(found, question)
    named = [cell for match in found.named for cell in (match.cell, match.baseline)]
    if not any(cell.values(metric) for cell in named):
        finished = any(cell.records for cell in named)
        none = (
            f"No finished point has a {title(metric)}" if finished else "No point that the question names has finished"
        )
        return Answer(question, found, asked, (f"{none}, so it has no answer yet.",), (), (), (), floor)
    comparisons = compared(found.named, metric, matters=question.smallest_difference)
    same = same_cost(grid, question.decide_by)
    advice = _advice(found.named, question, same)
    return Answer(
        question,
        found,
        asked,
        (_verdicts(found.named, comparisons, question), _recommended(advice, question)),
        tuple(comparisons),
        advice,
        _orders(found.named, metric),
        floor,
        same,
    )


def verdict_of(each: Comparison, question: Question) -> str:
    """In the words of a table."""
    if each.verdict in (Verdict.LARGER, Verdict.SMALLER):
        return _better_or_worse(each.verdict, question.metric)
    return str(each.verdict)


def _asked(found: Families, question: Question) -> str:
    points = list(dict.fromkeys(match.short for match in found.named))
    settings = [setting for setting in dict.fromkeys(match.setting for match in found.named) if setting]
    over = f", in {len(settings)} settings" if len(settings) > 1 else f", at {settings[0]}" if settings else ""
    matters = "" if question.smallest_difference is None else f" by as much as {question.smallest_difference:g}"
    what = _listed(list(dict.fromkeys(match.baseline_short for match in found.named)))
    return (
        f"Does {title(question.metric)} at {_listed(points)} differ from {what}{matters}{over}, and which is the "
        f"cheapest by {question.decide_by}?"
    )


def _verdicts(matches: Sequence[Match], comparisons: Sequence[Comparison], question: Question) -> str:
    if len(matches) <= _MANY:
        clauses = [_clause(match, each, question) for match, each in zip(matches, comparisons, strict=True)]
        return _capital("; ".join(clauses)) + "."
    clauses = []
    baseline = _listed(list(dict.fromkeys(match.baseline_short for match in matches)))
    for verdict in Verdict:
        if of_it := [each for each in comparisons if each.verdict is verdict]:
            be = "is" if len(of_it) == 1 else "are"
            clauses.append(f"{len(of_it)} {be} {_summary(verdict, of_it, question)}")
    return f"Of {len(matches)} comparisons with {baseline}, {_listed(clauses)}."


def _clause(match: Match, each: Comparison, question: Question) -> str:
    name, other = match.within, match.baseline_short
    seeds = len(each.pairs.differences)
    match each.verdict:
        case Verdict.TOO_FEW_SEEDS:
            mean = "" if each.mean is None else f": its mean difference to {other}, {each.mean:+.3g}, has none"
            return f"{name} has {_count(seeds, 'pair')} of seeds, and an interval needs {FEWEST_SEEDS}{mean}"
        case Verdict.NOT_DISTINGUISHABLE:
            return f"{name} is not distinguishable from {other} at {seeds} seeds: smaller than {each.at_most:.3g}"
    assert each.mean is not None and each.interval is not None
    if each.verdict is Verdict.EQUIVALENT:
        return (
            f"{name} differs from {other} by less than the {question.smallest_difference:g} that matters "
            f"({each.mean:+.3g}, p = {each.p_equivalent:.2g})"
        )
    low, high = each.interval.low, each.interval.high
    if each.mean < 0:
        low, high = -high, -low
    word = _better_or_worse(each.verdict, question.metric)
    return f"{name} is {word} than {other} by {abs(each.mean):.3g} ({low:.3g} to {high:.3g})"


def _summary(verdict: Verdict, of_it: Sequence[Comparison], question: Question) -> str:
    if verdict is Verdict.TOO_FEW_SEEDS:
        return f"without an interval, which needs {FEWEST_SEEDS} pairs of seeds"
    if verdict is Verdict.NOT_DISTINGUISHABLE:
        return f"not distinguishable (smaller than {_range([each.at_most or 0.0 for each in of_it])})"
    if verdict is Verdict.EQUIVALENT:
        return f"different by less than the {question.smallest_difference:g} that matters"
    sizes = [abs(each.mean or 0.0) for each in of_it]
    return f"{_better_or_worse(verdict, question.metric)} by {_range(sizes)}"


def _better_or_worse(verdict: Verdict, metric: str) -> str:
    return "worse" if (verdict is Verdict.LARGER) == lower_is_better(metric) else "better"


def _advice(matches: Sequence[Match], question: Question, same: float) -> tuple[Advice, ...]:
    return tuple(_advice_at(setting, cells, question, same) for setting, cells in settings_of(matches).items())


def _advice_at(setting: str, cells: dict[str, Cell], question: Question, same: float) -> Advice:
    metric, by = question.metric, question.decide_by
    if question.smallest_difference is None:
        return Advice(setting, None, "the question states no `smallest_difference`")
    sign = 1.0 if lower_is_better(metric) else -1.0
    with_results = {name: cell for name, cell in cells.items() if cell.values(metric)}
    if len(with_results) < len(cells):
        missing = [name for name in cells if name not in with_results]
        return Advice(setting, None, f"{_listed(missing)} {'has' if len(missing) == 1 else 'have'} no result")
    prices = {name: cost(cell, by) for name, cell in with_results.items()}
    if None in prices.values():
        return Advice(setting, None, f"the ledger has no {by} of {_listed([n for n in prices if prices[n] is None])}")
    candidates = {
        name: Candidate(prices[name] or 0.0, cell.by_seed(metric, sign)) for name, cell in with_results.items()
    }
    found = recommend(candidates, matters=question.smallest_difference, same_cost=same, metric=title(metric), sign=sign)
    return Advice(setting, found, "" if found.name else found.reasons[0])


def _recommended(advice: Sequence[Advice], question: Question) -> str:
    by, metric = question.decide_by, title(question.metric)
    given = [each for each in advice if each.taken is not None]
    if len(advice) == 1 and advice[0].recommendation is not None and advice[0].recommendation.name is not None:
        return _one(advice[0].recommendation, question)
    if not given:
        return f"Nothing is recommended: {_listed(list(dict.fromkeys(each.why_not or _UNSURE for each in advice)))}."
    clauses = []
    if len(given) <= _MANY:
        clauses = [f"{name} at {setting} ({share:.0%})" for name, setting, share in _taken(given)]
    else:
        for name, number in Counter(name for name, _, _ in _taken(given)).most_common():
            shares = [share for other, _, share in _taken(given) if other == name]
            clauses.append(f"{name} in {number} of {len(advice)} settings ({_range(shares, '.0%')})")
    rest = [each for each in advice if each not in given]
    none = f"; none is recommended at {_first([each.setting for each in rest])}" if rest else ""
    return (
        f"By {by} take {_listed(clauses)}: the cheapest whose {metric} is not worse than the best by more than "
        f"{question.smallest_difference:g}, with the share of bootstrap draws that say so{none}."
    )


def _one(found: Recommendation, question: Question) -> str:
    """Of a single setting."""
    assert found.name is not None
    by, matters = question.decide_by, f"{question.smallest_difference:g}"
    share, seeds = f"{found.chosen[found.name]:.0%} of bootstrap draws", f"{len(found.seeds)} seeds"
    only = f"only of the best, {found.best}," if found.shown == found.best else f"of {found.shown}"
    shown = "" if found.shown == found.name else f"; {seeds} show it {only}".rstrip(",")
    if found.chosen[found.name] < _TRUSTED:
        doubt = f"is the cheapest within {matters} of the draw's best in only {share}"
        if found.name == found.best:
            return (
                f"By {by} nothing is recommended: {found.name} has the best {title(question.metric)}, but it {doubt}."
            )
        return (
            f"By {by} nothing cheaper than the best is recommended: {found.name} is the cheapest that {seeds} do not "
            f"tell to be worse by more than {matters}, but it {doubt}{shown}."
        )
    return (
        f"By {by} take {found.name}: the cheapest whose {title(question.metric)} is not worse than the best by more "
        f"than {matters}, as it is in {share} of {seeds}{shown}."
    )


def _taken(given: Sequence[Advice]) -> list[tuple[str, str, float]]:
    """(point, setting, share of draws) of each."""
    return [
        (each.taken, each.setting, each.recommendation.chosen[each.taken])
        for each in given
        if each.recommendation is not None and each.taken is not None
    ]


def _orders(matches: Sequence[Match], metric: str) -> tuple[Order, ...]:
    """Where points cannot be told apart, the sentence refuses to rank them."""
    said = []
    for setting, cells in settings_of(matches).items():
        found = groups({name: cell.by_seed(metric) for name, cell in cells.items() if cell.values(metric)})
        order = " < ".join("{" + ", ".join(group) + "}" if len(group) > 1 else group[0] for group in found.groups)
        tied = [group for group in found.groups if len(group) > 1]
        words = f"{title(metric)} is in the order {order}" if len(found.groups) > 1 else ""
        if tied:
            inside = " and ".join(_listed(list(group)) for group in tied)
            words += (
                f"{'; ' if words else ''}within {inside} no ranking is given, since not all of them can be told apart"
            )
        elif words:
            words += ", and all can be told apart"
        if words:
            where = f"At {setting}: " if setting else ""
            said.append(Order(setting, order, _capital(f"{where}{words}.")))
    return tuple(said)


def _listed(parts: Sequence[str]) -> str:
    """'a, b and c'"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _first(parts: Sequence[str]) -> str:
    """'a, b and 7 more'"""
    more = len(parts) - _MANY
    return _listed([*parts[:_MANY], *([f"{more} more"] if more > 0 else [])])


def _range(values: Sequence[float], form: str = ".3g") -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
