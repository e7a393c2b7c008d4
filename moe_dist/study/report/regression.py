"""How loss scales over the grid: active parameters, experts and tokens with the capacity factor beside."""

from collections.abc import Sequence

from moe_dist.config.extras import install
from moe_dist.study.ledger.cells import Cell
from moe_dist.study.page.model import Part, Prose, Table, Value
from moe_dist.study.report.metric import title
from moe_dist.study.statistics.samples import Interval

_TERMS = ("active_parameters", "experts", "tokens")


def regression(grid: Sequence[Cell], metric: str, floor: float) -> list[Part]:
    """metric: a loss in nats. floor: L0 of the study's ladder, or 0."""
    rows = _rows(grid, metric)
    varied = [term for at, term in enumerate(_TERMS) if len({row[at] for row in rows}) > 1]
    if not varied:
        return [Prose(["Scaling is left out: active parameters, experts and tokens are the same in all points."])]
    try:
        from moe_dist.study.statistics.scaling import Observation, scaling
    except ImportError:
        return [Prose([f"Scaling is left out: it needs statsmodels, which is not installed: {install('study')}."])]
    runs = [Observation(*row) for row in rows]
    levels = list(dict.fromkeys(run.factor for run in runs))
    baseline = None if None in levels else levels[0]
    try:
        found = scaling(runs, floor=floor, baseline=baseline)
    except ValueError as error:
        return [Prose([f"Scaling is left out: {error}."])]
    lines: list[list[Value]] = []
    for name, each in found.exponents.items():
        lines.append([f"exponent of {name.replace('_', ' ')}", each.value, *_ends(each.interval)])
    for factor, each in found.factors.items():
        lines.append([f"capacity factor {'dropless' if factor is None else factor}", each.value, *_ends(each.interval)])
    against = "dropless" if baseline is None else f"factor {baseline}"
    said = [f"`{name}` is left out: it {why}." for name, why in found.left_out.items()]
    said += [f"{note[:1].upper()}{note[1:]}." for note in found.notes]
    note = (
        f"log({title(metric)} - {floor:.4g}) by least squares over {len(runs)} runs: exponents, and for each capacity "
        f"factor what it adds against {against}; residuals of {found.deviation:.2%}."
    )
    table = Table(
        name="scaling",
        title="Loss in active parameters, experts and tokens",
        columns=["term", "value", "low", "high"],
        rows=lines,
        formats=dict.fromkeys(("value", "low", "high"), "+.4f"),
        note=note,
    )
    return [table, Prose(said)] if said else [table]


def _rows(grid: Sequence[Cell], metric: str) -> list[tuple[float, float, float, float | None, int, float]]:
    """(active parameters, experts, tokens, capacity factor, seed, loss) of each run that has them."""
    found: list[tuple[float, float, float, float | None, int, float]] = []
    for cell in grid:
        moe = cell.points[0].config.model.moe
        if moe.num_experts == 0 or isinstance(moe.capacity_factor, list):
            continue
        for record in cell.records:
            if record.get(metric) is not None and record.get("tokens"):
                sizes = (record["active_parameters"], moe.num_experts, record["tokens"])
                found.append((*sizes, moe.capacity_factor, record["seed"], record[metric]))
    return found


def _ends(interval: Interval | None) -> tuple[Value, Value]:
    return (None, None) if interval is None else (interval.low, interval.high)
