"""What the seeds can tell: every capacity factor against dropless, and the drops that chance alone explains.

Both are made of statistics/; here is only which numbers of a study go into them.
"""

from collections.abc import Sequence

from moe_dist.config import Config
from moe_dist.config.rules.batch import batch_shape
from moe_dist.moe.capacity import expert_capacity
from moe_dist.study.cells import Cell
from moe_dist.study.grid import CAPACITY, Study, axis_names, in_words
from moe_dist.study.statistics.drops import uniform_drops
from moe_dist.study.statistics.paired import Comparison, compare
from moe_dist.study.statistics.power import noise_floor


def against_dropless(study: Study, grid: Sequence[Cell]) -> list[str]:
    """Lines of Markdown; none where the study has no dropless runs beside capped ones.

    All comparisons of the page are one family, of which each baseline's points have an equal share of the 5%.
    """
    groups = [(cell, _capped(cell, grid)) for cell in grid if cell.axes.get(CAPACITY, 0) is None]
    groups = [(baseline, capped) for baseline, capped in groups if baseline.records and capped]
    alpha = 0.05 / max(1, len(groups))
    rows = [_row(each) for baseline, capped in groups for each in _compared(study, baseline, capped, alpha)]
    if not rows:
        return []
    head = ["", "minus dropless", "interval", "p (Holm)", "shown with 80%", "verdict"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    floor = noise_floor({str(number): cell.by_seed("validation_loss") for number, cell in enumerate(grid)})
    told = "" if floor is None else f" Seeds of one point spread by {floor.deviation:.4f}."
    return [
        "## Against dropless",
        "",
        *lines,
        "",
        f"Validation loss, seed by seed: the mean difference with its {1 - alpha:.4g} t interval; p after Holm; the "
        "difference that so many seeds would show in 80 of 100 studies. Without any effect, a study in 20 has a claim "
        f"in this table.{told}",
    ]


def dropped_by_chance(config: Config, ranks: int) -> float | None:
    """Share of assignments that uniform random routing would drop, 0 to 1; None where no theory covers the settings:
    factors by layer or step, rerouting, expert choice, attention experts, texts with padding."""
    moe = config.model.moe
    if moe.num_experts == 0 or isinstance(moe.capacity_factor, list) or moe.capacity_schedule:
        return None
    if moe.router == "expert_choice" or moe.overflow == "reroute" or config.model.attention.kind == "switch":
        return None
    if config.task == "classification":
        return None
    shape, tp = batch_shape(config.train, ranks // config.parallel.tp), config.parallel.tp
    mine = shape.micro_batch * shape.seq_len // tp
    tokens = shape.micro_step_sequences * shape.seq_len if moe.capacity_scope == "global" else mine
    capacity = expert_capacity(moe.capacity_factor, moe.top_k, tokens, moe.num_experts, moe.min_capacity)
    return uniform_drops(tokens, moe.top_k, moe.num_experts, capacity, moe.capacity_pool).rate


def _capped(baseline: Cell, grid: Sequence[Cell]) -> list[Cell]:
    """Those that share all else with it."""
    return [
        cell for cell in grid if cell.records and cell is not baseline and cell.axes | {CAPACITY: None} == baseline.axes
    ]


def _compared(study: Study, baseline: Cell, capped: Sequence[Cell], alpha: float) -> list[Comparison]:
    names = axis_names(list(study.file.axes))
    points = {in_words(cell.axes, names): cell.by_seed("validation_loss") for cell in capped}
    return compare(points, baseline.by_seed("validation_loss"), alpha=alpha)


def _row(each: Comparison) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    interval = "–" if each.interval is None else f"{each.interval.low:+.4f} to {each.interval.high:+.4f}"
    left = [("without its pair", each.pairs.only_point), ("missing", each.pairs.only_baseline)]
    words = [each.words, *(f"seeds {', '.join(map(str, seeds))} {why}" for why, seeds in left if seeds)]
    return [
        each.name,
        shown(each.mean, "+.4f"),
        interval,
        shown(each.p_holm, ".3f"),
        shown(each.detectable, ".4f"),
        "; ".join(words),
    ]
