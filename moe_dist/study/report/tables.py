"""The tables of a report: cells, comparisons, costs, checks, failed points and the setting."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.config import Config, ModelConfig
from moe_dist.study.design.grid import Study, axis_names, show
from moe_dist.study.design.study_file import Question
from moe_dist.study.ledger.cells import Cell, label
from moe_dist.study.ledger.measure import loss_unit
from moe_dist.study.page.model import Table, Value
from moe_dist.study.report.answer import Answer, verdict_of
from moe_dist.study.report.checks import CHECKS
from moe_dist.study.report.costs import COSTS, cost, counted_as_equal
from moe_dist.study.report.finding import Finding
from moe_dist.study.report.matches import Match
from moe_dist.study.report.metric import difference_form, spread, title
from moe_dist.study.report.theory import dropped_by_chance
from moe_dist.study.statistics.paired import Comparison, pair
from moe_dist.study.statistics.samples import Interval

_LOSSES = (
    "validation_loss",
    "validation_loss_capped",
    "validation_bits_per_byte",
    "validation_bits_per_token",
    "validation_accuracy",
    "validation_macro_f1",
    "test_accuracy",
    "test_macro_f1",
    "loss",
)

_PLAIN = {
    "drop_rate": ("dropped, end", "{:.2f} %", 100.0),
    "drop_rate_whole_run": ("dropped, whole run", "{:.2f} %", 100.0),
    "steps_until_few_drops": ("steps until 3 %", "{:.0f}", 1.0),
    "load_max_over_mean": ("fullest expert", "{:.2f}", 1.0),
    "router_entropy": ("router entropy", "{:.3f}", 1.0),
}

RESULTS_NOTE = """Mean ± sample standard deviation over seeds. Losses in {unit}; validation drops nothing, unless it is
capped. Minus the baseline: seed by seed.""".replace("\n", " ")
ROUTING_NOTE = """Dropped: share of assignments, over the last quarter of the run and over all of it. By chance: what
uniform random routing would drop. Steps until 3 %: until 20 steps in a row dropped less than that, of the seeds that
came there. Fullest expert: its load over the mean load before dropping, in the last quarter.""".replace("\n", " ")
MORE_NOTE = (
    "p: before Holm. Equivalent: p of a difference that matters; small where there is none. All at once: intervals "
    "that hold together with 95%."
)


def results_table(study: Study, grid: Sequence[Cell], baselines: Mapping[int, Cell], metric: str) -> Table:
    """One row for each combination of the axes. baselines: id of a cell -> its baseline."""
    names = axis_names(list(grid[0].axes))
    losses = [name for name in _LOSSES if any(cell.values(name) for cell in grid)]
    columns = [*names.values(), "seeds", *map(title, losses), *(["minus baseline"] if baselines else [])]
    form_of_difference = difference_form(*(value for cell in grid for value in cell.values(metric)))
    rows = []
    for cell in grid:
        row: list[Value] = [label(key, value) for key, value in cell.axes.items()] + [len(cell.records)]
        row += [spread(cell.values(name), *_form(name)) for name in losses]
        if baselines:
            baseline = baselines.get(id(cell))
            differences = {} if baseline is None else pair(cell.by_seed(metric), baseline.by_seed(metric)).differences
            row.append(spread(list(differences.values()), f"{{:{form_of_difference}}}"))
        rows.append(row)
    units = dict.fromkeys(loss_unit(record) for cell in grid for record in cell.records)
    note = RESULTS_NOTE.format(unit=" and ".join(units))
    return Table(name="points", title="What the points reached", columns=columns, rows=rows, note=note)


def routing_table(study: Study, grid: Sequence[Cell]) -> Table:
    """One row for each combination of the axes."""
    names = axis_names(list(grid[0].axes))
    plain = {name: how for name, how in _PLAIN.items() if any(cell.values(name) for cell in grid)}
    columns = [*names.values(), *(heading for heading, _, _ in plain.values())]
    columns += ["by chance", "C", "tokens per micro-step"]
    rows = []
    for cell in grid:
        row: list[Value] = [label(key, value) for key, value in cell.axes.items()]
        row += [spread(cell.values(name), form, scale) for name, (_, form, scale) in plain.items()]
        row.append(dropped_by_chance(cell.points[0].config, study.file.ranks))
        rows.append([*row, _same(cell, "expert_capacity"), _same(cell, "tokens_per_micro_step")])
    return Table(
        name="routing",
        title="What the points dropped",
        columns=columns,
        rows=rows,
        formats={"by chance": ".2%"},
        note=ROUTING_NOTE,
    )


def comparisons_tables(
    name: str, heading: str, matches: Sequence[Match], found: Sequence[Comparison], question: Question, note: str
) -> list[Table]:
    """What an answer is read from; then what else there is to know of the same comparisons."""
    columns = ["point", "baseline", "seeds", "minus baseline", "low", "high", "p (Holm)", "verdict", "shown with 80%"]
    more = ["p", "p (equivalent)", "all at once, low", "all at once, high", "bootstrap, low", "bootstrap, high"]
    rows: list[list[Value]] = []
    others: list[list[Value]] = []
    for match, each in zip(matches, found, strict=True):
        left = [("without their pair", each.pairs.only_point), ("missing", each.pairs.only_baseline)]
        words = [verdict_of(each, question), *(f"seeds {_seeds(seeds)} {why}" for why, seeds in left if seeds)]
        who: list[Value] = [match.name, match.baseline_short]
        row = [*who, len(each.pairs.differences), each.mean, *_ends(each.interval), each.p_holm]
        rows.append([*row, "; ".join(words), each.detectable])
        others.append([*who, each.p, each.p_equivalent, *_ends(each.together), *_ends(each.bootstrap)])
    compared = (cell for match in matches for cell in (match.cell, match.baseline))
    form = difference_form(*(value for cell in compared for value in cell.values(question.metric)))
    formats = dict.fromkeys(columns[3:6], form) | {"p (Holm)": ".3g", "shown with 80%": form.removeprefix("+")}
    formats_of_more = dict.fromkeys(more[2:], form) | dict.fromkeys(more[:2], ".3g")
    return [
        Table(name=name, title=heading, columns=columns, rows=rows, formats=formats, note=note),
        Table(
            name=f"{name}-more",
            title=f"{heading}: further tests and intervals",
            columns=[*columns[:2], *more],
            rows=others,
            formats=formats_of_more,
            note=MORE_NOTE,
        ),
    ]


def advice_table(found: Answer) -> Table:
    """The recommendation at each setting, and which points may be ranked. found: of a question."""
    by = None if found.question is None else found.question.decide_by
    orders = {order.setting: order.groups for order in found.orders}
    rows: list[list[Value]] = []
    for each in found.advice:
        one = each.recommendation
        taken: list[Value] = [None, None, None, None]
        if one is not None and one.name is not None:
            taken = [each.taken, one.chosen[one.name], one.best, one.shown]
        rows.append([each.setting, *taken, orders.get(each.setting), each.reasons])
    columns = ["setting", "take", "share of draws", "best", "shown", "order", "reasons"]
    same = "" if by is None else counted_as_equal({by: found.same_cost})
    note = (
        "Take: the cheapest not worse than the best by more than matters, where half of the bootstrap draws do. "
        "Shown: the cheapest that the seeds show not to be worse by as much. Points in braces cannot be told apart, so "
        "they have no order." + same
    )
    formats = {"share of draws": ".0%"}
    return Table(name="advice", title="What to take", columns=columns, rows=rows, formats=formats, note=note)


def costs_table(grid: Sequence[Cell]) -> Table:
    names = axis_names(list(grid[0].axes))
    plain = {
        "parameters": (",.0f", 1.0, "parameters"),
        "active_parameters": (",.0f", 1.0, "active parameters"),
        "tokens": (",.0f", 1.0, "tokens"),
        "steps": (",.0f", 1.0, "steps"),
        "step_seconds": (".1f", 1e3, "step (ms)"),
        "step_seconds_low": (".1f", 1e3, "step, lower quartile (ms)"),
        "step_seconds_high": (".1f", 1e3, "step, upper quartile (ms)"),
        "tokens_per_second": (",.0f", 1.0, "tokens/s"),
        "flops": (".3g", 1.0, "FLOPs, nominal"),
        "tflops": (".4g", 1.0, "TFLOP/s, nominal"),
        "tflops_executed": (".4g", 1.0, "TFLOP/s, executed"),
        "dispatch_rows_bytes": (".3f", 1e-6, "rows to experts (MB a step)"),
        "dispatch_bytes": (".3f", 1e-6, "crossing ranks (MB a step)"),
        "seconds": (".0f", 1.0, "all steps (s)"),
    }
    kept = {name: how for name, how in plain.items() if any(cell.values(name) for cell in grid)}
    costs = [by for by in COSTS if any(cost(cell, by) is not None for cell in grid)]
    rows: list[list[Value]] = []
    for cell in grid:
        row: list[Value] = [label(key, value) for key, value in cell.axes.items()]
        for name, (_, scale, _) in kept.items():
            mean = cell.mean(name)
            row.append(None if mean is None else mean * scale)
        row += [cost(cell, by) if cell.records else None for by in costs]
        rows.append(row)
    return Table(
        name="costs",
        title="What the points cost",
        columns=[*names.values(), *(heading for _, _, heading in kept.values()), *(COSTS[by] for by in costs)],
        rows=rows,
        formats={heading: form for form, _, heading in kept.values()} | {COSTS[by]: ".4g" for by in costs},
        note="Means over seeds; step times and rates are medians over the steps of a run.",
    )


def checks_table(findings: Sequence[Finding]) -> Table:
    rows: list[list[Value]] = []
    for name in CHECKS:
        of_it = [finding for finding in findings if finding.check == name]
        rows += [[name, each.level, each.what, ", ".join(each.points), each.remedy] for each in of_it]
        if not of_it:
            rows.append([name, "kept", "", "", ""])
    if not findings:
        rows = [row[:2] for row in rows]
    return Table(
        name="checks",
        title="Does the design support the question?",
        columns=["check", "result", "what", "points", "what to do"][: len(rows[0])],
        rows=rows,
    )


def failed_table(study: Study, latest: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """None where no point failed."""
    rows: list[list[Value]] = []
    for point in study.points:
        record = latest.get(point.name, {})
        if record.get("status") == "failed":
            log = record.get("log_tail") or ""
            tail = log if isinstance(log, str) else "\n".join(log)
            rows.append([point.name, record.get("attempt"), record.get("reason"), tail])
    if not rows:
        return None
    columns = ["point", "attempt", "reason", "end of its log"]
    return Table(name="failed", title="Failed points", columns=columns, rows=rows, note="They are in no number.")


def setting_table(study: Study, grid: Sequence[Cell]) -> Table:
    configs, records = [point.config for point in study.points], [record for cell in grid for record in cell.records]
    axes: dict[str, list[str]] = {}
    for cell in grid:
        for key, value in cell.axes.items():
            axes.setdefault(key, []).append(label(key, value))
    rows: dict[str, str | list[str]] = {
        "study": str(study.path),
        "base": os.path.normpath(study.path.parent / study.file.base),
        **{key: show(value) for key, value in study.file.overrides.items()},
        **{key: ", ".join(dict.fromkeys(values)) for key, values in axes.items()},
        "seeds": ", ".join(map(str, dict.fromkeys(point.seed for point in study.points))),
        "ranks": [f"{study.file.ranks}, ep {config.parallel.ep}, tp {config.parallel.tp}" for config in configs],
        "data": [config.data.kind for config in configs],
        "data digest": [str(record["data_digest"]) for record in records if record.get("data_digest")],
        "model": [_model(config.model) for config in configs],
        "parameters": [f"{record['parameters']:,}, {record['active_parameters']:,} active" for record in records],
        "training": [_training(config) for config in configs],
        "device": [str(record["device"]) for record in records if record.get("device")],
        "machine": [_pairs(record["machine"]) for record in records if record.get("machine")],
        "versions": [_pairs(record["versions"]) for record in records if record.get("versions")],
        "revision": [str(record["revision"]) for record in records if record.get("revision")],
    }
    lines: list[list[Value]] = [
        [key, value if isinstance(value, str) else "; ".join(dict.fromkeys(value))]
        for key, value in rows.items()
        if value
    ]
    return Table(name="setting", title="Setting", columns=["what", "value"], rows=lines)


def _ends(interval: Interval | None) -> list[Value]:
    return [None, None] if interval is None else [interval.low, interval.high]


def _form(name: str) -> tuple[str, float]:
    return ("{:.2f} %", 100.0) if "accuracy" in name else ("{:.4f}", 1.0)


def _same(cell: Cell, name: str) -> Value:
    """What the records say of it, once where all say the same."""
    return ", ".join(dict.fromkeys(str(record[name]) for record in cell.records if record.get(name) is not None))


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _model(model: ModelConfig) -> str:
    moe = model.moe
    return f"{model.num_layers} layers, d_model {model.d_model}, {moe.num_experts} experts, top_k {moe.top_k}"


def _training(config: Config) -> str:
    train, what = config.train, "texts of up to" if config.task == "classification" else "sequences of"
    return f"{train.steps} steps of {train.global_batch} {what} {train.seq_len} tokens"
