"""Where drops fall: by place in the sequence and in the micro-step, and by how often the token is in the corpus."""

from collections.abc import Mapping

import numpy as np

from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import svg_of
from moe_dist.study.report.figures.canvas import LINES, from_zero, left_out, legend, look, panels, spread_over
from moe_dist.study.report.reduced import Reduced
from moe_dist.study.statistics.samples import Floats

_KINDS = {
    "sequence": ("dropped_by_place", "place in the sequence"),
    "micro-step": ("dropped_by_micro_step_place", "place in the micro-step"),
    "frequency": ("dropped_by_frequency", "how often the token is: rarest first"),
}


def drops_by_place(cells: Mapping[str, Reduced]) -> Figure | None:
    """None where no cell has any of the three."""
    kinds = {kind: how for kind, how in _KINDS.items() if any(how[0] in one.counts for one in cells.values())}
    if not kinds:
        return None
    shown = spread_over(list(cells), LINES)
    rows: list[list[Value]] = []
    for name, one in cells.items():
        for kind in kinds:
            rates = drop_rates(one, kind)
            rows += [[name, kind, at, float(rate)] for at, rate in enumerate(rates if rates is not None else ())]
    with panels(1, len(kinds)) as (figure, grid):
        for axes, (kind, (_, title)) in zip(grid[0], kinds.items(), strict=True):
            for number, name in enumerate(shown):
                if (rates := drop_rates(cells[name], kind)) is not None:
                    color, marker = look(number)
                    axes.plot(100 * rates, color=color, marker=marker, label=name)
            axes.set_title(title)
            from_zero(axes)
        grid[0][0].set_ylabel("assignments dropped (%)")
        legend(figure, grid[0][0])
        svg = svg_of(figure)
    return Figure(
        name="drops-by-place",
        title="Where drops fall",
        caption="Over all layers and the last quarter of the schedule: dropped over all assignments of the same part. "
        "Parts of sequence and micro-step are 16 equal ones, those of frequency each an eighth of the corpus's tokens."
        + left_out(len(shown), len(cells), "points"),
        svg=svg,
        columns=["point", "by", "part", "drop_rate"],
        rows=rows,
    )


def drop_rates(one: Reduced, kind: str) -> Floats | None:
    """Of each part. Assignments are counted by frequency; places have equal parts of them."""
    dropped = one.over_layers(_KINDS[kind][0])
    if dropped is None or "load" not in one.counts:
        return None
    if kind == "frequency":
        asked = one.over_layers("load_by_frequency")
        if asked is None:
            return None
    else:
        asked = np.full(len(dropped), sum(float(load_E.sum()) for load_E in one.counts["load"]) / len(dropped))
    return np.divide(dropped, asked, out=np.zeros(len(dropped)), where=asked > 0)
