"""The sections of a report that no question names: which numbers of a study go into which figure."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from moe_dist.study.design.grid import CAPACITY, Scalar, Study, axis_names
from moe_dist.study.design.study_file import GivenLaw
from moe_dist.study.ledger.cells import Cell, called, label, names_of
from moe_dist.study.ledger.measurements import FILE
from moe_dist.study.page.model import Part, Prose, Section, Table, Value
from moe_dist.study.report.costs import COSTS, cost, costs_of, same_cost
from moe_dist.study.report.figures.against import Line, Stop, against
from moe_dist.study.report.figures.canvas import LINES, places_of
from moe_dist.study.report.figures.drops_by_place import Tokens, drops_by_place
from moe_dist.study.report.figures.drops_over_run import drops_over_run
from moe_dist.study.report.figures.drops_split import drops_split, split_layers
from moe_dist.study.report.figures.ladder import held_out_in_words, ladder_figure
from moe_dist.study.report.figures.loads import loads
from moe_dist.study.report.figures.pareto import Priced, pareto_figure
from moe_dist.study.report.ladder import Ladders, ladders
from moe_dist.study.report.matches import Families, baseline_of
from moe_dist.study.report.metric import lower_is_better, title
from moe_dist.study.report.reduced import Reduced, late_in_words, reduce_points, together
from moe_dist.study.report.regression import regression
from moe_dist.study.report.theory import competition
from moe_dist.study.statistics.paired import pair
from moe_dist.study.statistics.samples import BySeed

_MINUS = "minus_baseline"
_NATS = ("validation_loss", "validation_loss_capped", "loss")


def x_axis(study: Study) -> str:
    """The axis that figures are drawn against: the question's, else the capacity factor, else the first."""
    axes = list(study.points[0].axes)
    asked = [] if study.file.question is None else list(study.file.question.baseline)
    return next((key for key in (*asked, CAPACITY) if key in axes), axes[0])


def run_section(study: Study, grid: Sequence[Cell], found: Families, metric: str) -> Section:
    """Losses, evaluations and drops against the axis that is asked about."""
    key = x_axis(study)
    name = axis_names(list(grid[0].axes))[key]
    wanted = [metric, "validation_loss", "validation_loss_capped", "drop_rate", "steps_until_few_drops"]
    wanted += ["validation_accuracy", "loss"]
    metrics = {
        each: _shown_as(each, title(each)) for each in dict.fromkeys(wanted) if any(cell.values(each) for cell in grid)
    }
    if not metrics:
        said = "Nothing is drawn: no finished point has a loss, an evaluation or a drop rate."
        return Section(f"Against {name}", [Prose([said])], exploratory=True)
    minus = {
        id(match.cell): pair(match.cell.by_seed(metric), match.baseline.by_seed(metric)).differences
        for match in (*found.named, *found.others)
    }
    if any(minus.values()):
        metrics = {_MINUS: _shown_as(metric, f"{title(metric)}, minus baseline")} | metrics
    values = {
        id(cell): {each: cell.by_seed(each) for each in metrics} | {_MINUS: minus.get(id(cell), {})} for cell in grid
    }
    return Section(f"Against {name}", [against(_lines(grid, key, values), name, metrics)], exploratory=True)


def _lines(grid: Sequence[Cell], key: str, values: Mapping[int, Mapping[str, BySeed]]) -> list[Line]:
    """One for each combination of the other axes, in panels of as many as stay readable. values: by id of a cell."""
    names, places = names_of(grid), places_of([cell.axes[key] for cell in grid])
    rest = [axis for axis in grid[0].axes if axis != key]
    by_rest: dict[tuple[Scalar, ...], list[Cell]] = {}
    for cell in grid:
        by_rest.setdefault(tuple(cell.axes[axis] for axis in rest), []).append(cell)
    depth = next(
        depth for depth in range(len(rest) + 1) if max(Counter(at[:depth] for at in by_rest).values()) <= LINES
    )
    of_panel, of_line = ({axis: names[axis] for axis in part if axis in names} for part in (rest[:depth], rest[depth:]))
    return [
        Line(
            called(members[0].axes, of_panel),
            called(members[0].axes, of_line),
            [
                Stop(label(key, cell.axes[key]), places[cell.axes[key]], cell.axes[key] is None, values[id(cell)])
                for cell in members
            ],
            joined=not any(isinstance(cell.axes[key], bool | str) for cell in members),
        )
        for members in by_rest.values()
    ]


def dispatch_section(study: Study, grid: Sequence[Cell], found: Families) -> list[Section]:
    """What the layers did with their tokens; those that a question compares come first."""
    names = names_of(grid)
    asked = {id(cell) for match in found.named for cell in (match.cell, match.baseline)}
    ordered = sorted(grid, key=lambda cell: id(cell) not in asked)
    reduced: dict[str, Reduced] = {}
    tokens: dict[str, Tokens | None] = {}
    splits, uncovered, unlike = {}, [], []
    for cell in ordered:
        seeds = reduce_points([point.folder / FILE for point in cell.points if _finished(cell, point.name)])
        if not seeds:
            continue
        name = called(cell.axes, names)
        try:
            reduced[name] = together(seeds)
        except ValueError as error:
            unlike.append(f"{name} is left out of drops and load: {error}.")
            continue
        tokens[name] = Tokens.of(cell.points[0].config, study.file.ranks)
        of = competition(cell.points[0].config, study.file.ranks)
        if of is None:
            uncovered.append(name)
        elif of.capacity is not None and (split := split_layers(seeds, of)):
            splits[name] = split
    if not reduced:
        said = unlike or ["Drops by layer, place and expert are left out: the points have no measurements by layer."]
        return [Section("Drops and load", [Prose(said)], exploratory=True)]
    parts: list[Part] = [Prose(unlike)] if unlike else []
    dropping = {name: one for name, one in reduced.items() if np.nanmax(one.drop_rate_FL, initial=0.0) > 0}
    if dropping:
        parts.append(drops_over_run(dropping))
    else:
        parts.append(Prose(["No layer dropped anything."]))
    if splits:
        parts.append(drops_split(splits, late_in_words(reduced[name] for name in splits)))
    if uncovered:
        some = f"{uncovered[0]} and {len(uncovered) - 1} more" if len(uncovered) > 1 else uncovered[0]
        parts.append(Prose([f"No theory of chance covers the settings of {some}, so their drops are not split."]))
    if dropping and (places := drops_by_place(dropping, tokens)) is not None:
        parts.append(places)
    with_loads = {name: one for name, one in reduced.items() if "ranked_load" in one.counts}
    if with_loads:
        parts.append(loads(with_loads))
    return [Section("Drops and load", parts, exploratory=True)]


def pareto_section(grid: Sequence[Cell], metric: str) -> list[Section]:
    with_values = [cell for cell in grid if cell.values(metric)]
    if not with_values:
        said = f"The front of loss and cost is left out: no finished point has a {title(metric)}."
        return [Section("What it costs", [Prose([said])], exploratory=True)]
    known = costs_of(with_values)
    same = [by for by in known if len({cost(cell, by) for cell in with_values}) == 1]
    known = [by for by in known if by not in same]
    if not known:
        said = "The front of loss and cost is left out: the ledger has no cost in which the points differ."
        return [Section("What it costs", [Prose([said])], exploratory=True)]
    names = names_of(grid)
    points = {
        called(cell.axes, names): Priced(cell.by_seed(metric), {by: cost(cell, by) or 0.0 for by in known})
        for cell in with_values
    }
    sign = 1.0 if lower_is_better(metric) else -1.0
    same_costs = {by: same_cost(grid, by) for by in known}
    figure = pareto_figure(points, {by: COSTS[by] for by in known}, same_costs, title(metric), sign)
    missing = [by for by in COSTS if by not in (*known, *same)]
    parts: list[Part] = [figure]
    for kinds, why in ((missing, "the ledger has none or 0 of them"), (same, "all points cost the same")):
        if kinds:
            parts.append(Prose([f"Left out, since {why}: {', '.join(kinds)}."]))
    return [Section("What it costs", parts, exploratory=True)]


def compute_sections(study: Study, grid: Sequence[Cell], metric: str) -> list[Section]:
    """Loss against compute, and how it scales: over the floor L0 of the ladder where there is one."""
    of = metric if metric in _NATS else "validation_loss"
    parts: list[Part] = []
    floor = 0.0
    try:
        result = ladders(study, grid, baseline_of(study, study.file.question), of)
    except ValueError as error:
        parts.append(Prose([f"Left out: {error}."]))
    else:
        if result.ladders:
            floor = min(ladder.fit.law.floor for ladder in result.ladders)
            words = [held_out_in_words(ladder) for ladder in result.ladders]
            words += [result.left_out] if result.left_out else []
            parts += [ladder_figure(result.ladders, title(of)), Prose(words), _laws_table(result)]
        else:
            parts.append(Prose([result.left_out]))
        parts += [_speeds_table(result, study.file.law)] if result.speeds else []
    return [
        Section("Loss against compute", parts, exploratory=True),
        Section("Scaling", regression(grid, of, floor), exploratory=True),
    ]


def _laws_table(result: Ladders) -> Table:
    rows: list[list[Value]] = []
    for ladder in result.ladders:
        fit, held = ladder.fit, ladder.held_out
        row: list[Value] = [ladder.setting or "all", len(ladder.sizes), fit.seeds]
        for value, interval in ((fit.law.floor, fit.floor), (fit.law.exponent, fit.exponent)):
            row += [value, *((None, None) if interval is None else (interval.low, interval.high))]
        inside = "–" if held.inside is None else "inside" if held.inside else "outside"
        row += [fit.residual, held.predicted, held.measured, held.error, inside]
        rows.append(row)
    columns = ["setting", "sizes", "seeds", "L0", "L0, low", "L0, high", "a", "a, low", "a, high", "residual"]
    columns += ["largest, predicted", "largest, measured", "error", "95% interval"]
    formats = dict.fromkeys(columns[3:13], ".4g") | {"residual": ".2%", "error": "+.2%"}
    note = (
        "L = L0 + A C^-a by least Huber loss, with bootstrap intervals; the largest size is predicted from the others."
    )
    return Table(name="laws", title="The laws", columns=columns, rows=rows, formats=formats, note=note)


def _speeds_table(result: Ladders, given: GivenLaw | None) -> Table:
    by_size = given is None
    columns = ["setting", *([result.axis] if by_size else []), "point"]
    numbers = ["effective compute", "low", "high", "throughput", "effective speed", "speed, low", "speed, high"]
    numbers += ["over L0 and a, least", "over L0 and a, most"]
    rows: list[list[Value]] = []
    for each in result.speeds:
        of = each.effective
        row: list[Value] = [each.setting or "all", *([each.size] if by_size else []), of.name, of.compute]
        row += [None, None] if of.compute_interval is None else [of.compute_interval.low, of.compute_interval.high]
        row += [of.throughput, of.speed]
        row += [None, None] if of.speed_interval is None else [of.speed_interval.low, of.speed_interval.high]
        row += [None, None] if each.range is None else list(each.range)
        rows.append(row)
    ends = "the ends of the intervals of L0 and a"
    if given is not None:
        ends = f"L0 and a a tenth lower and higher, by the given law L0 = {given.floor:g}, a = {given.exponent:g}"
    note = (
        "Ratios to the baseline that shares all else. Compute: by loss alone, what the baseline would need for that "
        f"loss. Speed: that times throughput. Intervals hold the noise of the seeds; the last two columns: over {ends}."
    )
    return Table(
        name="speeds",
        title="Effective compute and speed",
        columns=columns + numbers,
        rows=rows,
        formats=dict.fromkeys(numbers, ".3f"),
        note=note,
    )


def _shown_as(name: str, heading: str) -> tuple[str, float]:
    """(heading, scale) of a number: shares in per cent."""
    return (f"{heading} (%)", 100.0) if _is_share(name) else (heading, 1.0)


def _is_share(name: str) -> bool:
    return "accuracy" in name or name == "drop_rate"


def _finished(cell: Cell, name: str) -> bool:
    return any(record["point"] == name for record in cell.records)
