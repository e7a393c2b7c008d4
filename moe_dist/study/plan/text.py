"""A plan as tables of at most 100 columns, for a terminal or a file."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from moe_dist.study.design.grid import refused
from moe_dist.study.design.names import axis_names, show
from moe_dist.study.design.probe import probe_path
from moe_dist.study.design.study_file import StudyFile
from moe_dist.study.plan.plan import Effect, Plan, PointCost
from moe_dist.study.statistics.samples import FEWEST_SEEDS
from moe_dist.train.record.progress import duration

_WIDTH = 100
_FIRST, _LAST = 16, 4  # combinations that are shown of a long grid
_INVALID = 20


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """console: where to; the standard output."""
    console = console or Console(width=_WIDTH, highlight=False, markup=False, emoji=False)

    def say(lines: Sequence[str]) -> None:
        for line in lines:
            console.print(line, style=None)

    say([*_head(plan), ""])
    if plan.points:
        console.print(_grid(plan))
        say(["", *_cost(plan), ""])
    say([*_invalid(plan), *effect_lines(plan.effect)])


def _head(plan: Plan) -> Iterator[str]:
    study = plan.study
    file, total = study.file, len(study.points)
    cells, repetitions = len(study.cells), len(file.repetitions)
    done = f", {plan.finished} of them finished" if plan.finished else ""
    yield f"{file.name}: {total} points, {cells} combinations with {repetitions} seed{'s' * (repetitions != 1)}{done}"
    for axis, values in file.all_axes.items():
        yield f"  {axis}: {', '.join(map(show, values))}"
    seeds = file.seeds
    told = seeds if isinstance(seeds, list) else [f"{part} {values}" for part, values in seeds.items()]
    yield f"  seeds: {', '.join(map(str, told))}"
    if note := few_seeds(file):
        yield f"  {note}"
    if study.left_out:
        yield f"  {study.left_out} points are left out by exclude"
    if file.equal is not None:
        yield f"  equal {file.equal}: {_budget(plan)}"


def few_seeds(file: StudyFile) -> str | None:
    """A line where seeds are too few for intervals, and so for an answer."""
    count = len(file.repetitions)
    if count >= FEWEST_SEEDS:
        return None
    few = f"{count} seed{'s' * (count != 1)}"
    return f"{few}: the report gives intervals and verdicts from {FEWEST_SEEDS} on; add seeds to the study's file"


def _budget(plan: Plan) -> str:
    steps = [point.steps for point in plan.points]
    if plan.residual is None:
        return "steps are those of the base until a probe has timed them"
    return (
        f"{min(steps, default=0)} to {max(steps, default=0)} steps, missed by at most {plan.residual:.2%}; warm-up "
        "keeps its share unless an axis sets it"
    )


def _grid(plan: Plan) -> Table:
    """A row for each combination, of its first seed; a long grid is cut in its middle."""
    names = axis_names(list(plan.study.file.all_axes))
    rows = list({tuple(point.axes.items()): point for point in reversed(plan.points)}.values())[::-1]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names.values():
        table.add_column(name, overflow="fold")
    for name in ("steps", "FLOPs", "to experts", "crossing", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    hidden = len(rows) - _FIRST - _LAST
    for number, point in enumerate(rows):
        if hidden > 1 and number == _FIRST:
            table.add_row(f"... {hidden} more")
        if hidden > 1 and _FIRST <= number < _FIRST + hidden:
            continue
        table.add_row(*(show(value) for value in point.axes.values()), *_numbers(point))
    return table


def _numbers(point: PointCost) -> tuple[str, ...]:
    return (
        str(point.steps),
        quantity(point.flops, ""),
        quantity(point.rows_bytes, "B"),
        quantity(point.crossing_bytes, "B"),
        "–" if point.seconds is None else duration(point.seconds),
    )


def _cost(plan: Plan) -> Iterator[str]:
    points, file = plan.points, plan.study.file
    flops, rows, crossing = (
        sum(getattr(point, name) for point in points) for name in ("flops", "rows_bytes", "crossing_bytes")
    )
    yield f"tokens    {quantity(sum(point.tokens for point in points), '')}"
    yield f"FLOPs     {quantity(flops, '')} at most, forward and backward"
    yield f"bytes     {quantity(rows, 'B')} to experts at most, {quantity(crossing, 'B')} crossing ranks, forward"
    if plan.seconds is None or plan.seconds_left is None:
        yield f"time      not known: {plan.untimed}"
    else:
        left = f", {duration(plan.seconds_left)} of it left" if plan.finished else ""
        beside = "" if file.at_once == 1 else f" at {file.at_once} points at once, if they do not slow each other"
        yield f"time      {duration(plan.seconds)}{beside}{left}"
        yield from _probed(plan)
    disk = sum(point.checkpoint_bytes for point in points)
    records = [point.record_bytes for point in points if point.record_bytes is not None]
    metrics = f", {quantity(sum(records), 'B')} of metrics" if records else ""
    yield f"disk      {quantity(disk, 'B')} of checkpoints{metrics}"


def _probed(plan: Plan) -> Iterator[str]:
    probe = plan.probe
    assert probe is not None
    steps = " to ".join(f"{1e3 * each.step_seconds:.1f}" for each in probe.points)
    yield (
        f"          from {steps} ms a step, {probe.start_seconds:.1f} s to start, timed on {probe.machine}, "
        f"{probe.measured[:16]}"
    )
    yield f"          remove {probe_path(plan.study.folder)} to time again"


def _invalid(plan: Plan) -> Iterator[str]:
    found = plan.study.invalid
    if not found:
        return
    yield f"{len(found)} points are refused; study run will not start before they are mended or left out with exclude:"
    reasons = refused(plan.study)
    for reason, names in list(reasons.items())[:_INVALID]:
        whose = "all of them" if len(names) == len(found) > 1 else names[0]
        beside = f" and {len(names) - 1} more" if 1 < len(names) < len(found) else ""
        yield f"  {whose}{beside}: {reason}"
    if len(reasons) > _INVALID:
        yield f"  ... {len(reasons) - _INVALID} more reasons; --json has all"
    yield ""


def effect_lines(effect: Effect | None) -> Iterator[str]:
    """What the seeds can show, in words."""
    if effect is None:
        yield "question  none is stated: the report will be exploratory only"
        return
    many = f"{effect.comparisons} comparison{'s' * (effect.comparisons != 1)}"
    yield f"question  {effect.metric}, {many}, {effect.seeds} seeds each"
    if effect.spread is None or effect.detectable is None:
        yield f"          not known: {effect.missing}"
        return
    source = "of the points that have finished" if effect.source == "pilot" else "that the question expects"
    yield f"          {effect.detectable:.4g} is the smallest effect that 80 of 100 such studies show,"
    yield f"          at a spread of differences over seeds of {effect.spread:.4g}, {source}"
    if effect.power is not None:
        needed = "more than 1000 seeds" if effect.seeds_needed is None else f"{effect.seeds_needed} seeds"
        yield f"          {effect.smallest_difference:.4g}, the smallest that matters, {effect.power:.0%} of them show;"
        yield f"          80% take {needed}"


def quantity(value: float, unit: str) -> str:
    """
    >>> quantity(1_230_000, "B"), quantity(0, "B")
    ('1.23 MB', '0 B')
    """
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()
