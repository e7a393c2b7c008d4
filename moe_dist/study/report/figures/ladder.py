"""Loss against compute with the law of each ladder, and the residuals, among them the largest size held out."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import plain, svg_of
from moe_dist.study.report.figures.canvas import legend, look, panels
from moe_dist.study.report.ladder import Ladder


def ladder_figure(ladders: Sequence[Ladder], metric: str) -> Figure:
    rows: list[list[Value]] = []
    with panels(1, 2, height=3.0) as (figure, ((losses, residuals),)):
        for number, ladder in enumerate(ladders):
            color, marker = look(number)
            law, held = ladder.fit.law, ladder.held_out
            compute = [rung.compute for rung in ladder.rungs]
            line = np.geomspace(min(compute), max(compute), 60)
            losses.plot(line, [law.loss(each) for each in line], color=color, label=plain(ladder.setting))
            for size, rung in zip(ladder.sizes, ladder.rungs, strict=True):
                values = list(rung.losses.values())
                off = [100 * (value / law.loss(rung.compute) - 1) for value in values]
                losses.plot([rung.compute] * len(values), values, marker, color=color, markersize=3.6)
                residuals.plot([rung.compute] * len(values), off, marker, color=color, markersize=3.6)
                for seed, value in rung.losses.items():
                    rows.append([ladder.setting, size, rung.compute, seed, value, law.loss(rung.compute)])
            residuals.plot(held.compute, 100 * held.error, "x", color=color, markersize=8, markeredgewidth=1.8)
            if held.interval is not None:
                low, high = (100 * (held.measured / end - 1) for end in (held.interval.high, held.interval.low))
                residuals.vlines(held.compute, low, high, color=color, linewidth=1.0)
            rows.append(
                [ladder.setting, f"{ladder.sizes[-1]}, held out", held.compute, None, held.measured, held.predicted]
            )
        residuals.axhline(0, linewidth=0.8)
        losses.set_ylabel(metric)
        residuals.set_ylabel("measured over the law (%)")
        for axes in (losses, residuals):
            axes.set_xscale("log")
            axes.set_xlabel("FLOPs of a run")
        legend(figure, losses)
        svg = svg_of(figure)
    return Figure(
        name="ladder",
        title="Loss against compute",
        caption="Lines: L0 + A C^-a, fitted to all sizes. Right: what each seed misses it by; the cross is the largest "
        "size against the law of the others alone, with its 95% interval.",
        svg=svg,
        columns=["setting", "size", "flops", "seed", "loss", "law"],
        rows=rows,
    )


def held_out_in_words(ladder: Ladder) -> str:
    """One sentence: whether the law predicts what it has not seen."""
    held, setting = ladder.held_out, f"At {ladder.setting} " if ladder.setting else ""
    measured = fmean(ladder.rungs[-1].losses.values())
    predicts = f"the law of the smaller sizes predicts {held.predicted:.4g} for {ladder.sizes[-1]}"
    said = f"{setting}{predicts}, where {measured:.4g} was measured"
    if held.interval is None:
        return f"{said[:1].upper()}{said[1:]} (no interval: fewer than three seeds)."
    where = "inside" if held.inside else "outside"
    text = f"{said}, {where} its 95% interval of {held.interval.low:.4g} to {held.interval.high:.4g}."
    return text[:1].upper() + text[1:]
