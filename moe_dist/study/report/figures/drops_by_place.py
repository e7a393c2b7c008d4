"""Where drops fall: by place in the sequence and in the micro-step, and by how often the token is in the corpus.

Assignments are counted by frequency alone. Of a language model every token makes as many, so a place's share of them is
its share of the tokens; a classifier's texts end in padding, which makes none, so its drops by place have no rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_dist.config import Config
from moe_dist.config.rules.batch import batch_shape
from moe_dist.study.page.model import Figure, Value
from moe_dist.study.page.theme import plain, svg_of
from moe_dist.study.report.figures.canvas import LINES, from_zero, left_out, legend, look, panels, spread_over
from moe_dist.study.report.reduced import Reduced, late_in_words
from moe_dist.study.statistics.samples import Floats

_KINDS = {
    "sequence": ("dropped_by_place", "place in the sequence"),
    "micro-step": ("dropped_by_micro_step_place", "place in the micro-step"),
    "frequency": ("dropped_by_frequency", "how often the token is: rarest first"),
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of a language model: how many a sequence has, and a micro-step over all ranks."""

    sequence: int
    micro_step: int

    @staticmethod
    def of(config: Config, ranks: int) -> "Tokens | None":
        """None of a classifier, whose padding makes no assignments."""
        if config.task != "language_modelling":
            return None
        shape = batch_shape(config.train, ranks // config.parallel.tp)
        return Tokens(shape.seq_len, shape.micro_step_sequences * shape.seq_len)


def drops_by_place(cells: Mapping[str, Reduced], tokens: Mapping[str, Tokens | None]) -> Figure | None:
    """None where no cell has any of the three. tokens: of each cell."""
    rates_of = {name: {kind: drop_rates(one, kind, tokens[name]) for kind in _KINDS} for name, one in cells.items()}
    kinds = [kind for kind in _KINDS if any(rates[kind] is not None for rates in rates_of.values())]
    if not kinds:
        return None
    shown = spread_over(list(cells), LINES)
    rows: list[list[Value]] = []
    for name, rates_by_kind in rates_of.items():
        for kind in kinds:
            rates = rates_by_kind[kind]
            known = () if rates is None else rates.tolist()
            rows += [[name, kind, at, None if rate != rate else rate] for at, rate in enumerate(known)]
    with panels(1, len(kinds)) as (figure, grid):
        for axes, kind in zip(grid[0], kinds, strict=True):
            for number, name in enumerate(shown):
                if (rates := rates_of[name][kind]) is not None:
                    color, marker = look(number)
                    axes.plot(100 * rates, color=color, marker=marker, label=plain(name))
            axes.set_title(_KINDS[kind][1])
            from_zero(axes)
        grid[0][0].set_ylabel("assignments dropped (%)")
        legend(figure, grid[0][0])
        svg = svg_of(figure)
    no_places = [name for name, each in tokens.items() if name in cells and each is None]
    return Figure(
        name="drops-by-place",
        title="Where drops fall",
        caption=f"Over all layers and {late_in_words(cells.values())}: dropped over all assignments of the same part. "
        "Sequence and micro-step are cut into 16 parts. Frequency: classes of token ids, from the rarest up, each with "
        "about an eighth of the corpus's tokens; an id that has more is a class of its own."
        + (" Places are left out of classifiers, whose texts end in padding." if no_places else "")
        + left_out(len(shown), len(cells), "points"),
        svg=svg,
        columns=["point", "by", "part", "drop_rate"],
        rows=rows,
    )


def drop_rates(one: Reduced, kind: str, tokens: Tokens | None) -> Floats | None:
    """Of each part, NaN where it has no assignments; None where nothing says how many a part has."""
    dropped = one.over_layers(_KINDS[kind][0])
    if dropped is None or "ranked_load" not in one.counts:
        return None
    if kind == "frequency":
        asked = one.over_layers("load_by_frequency")
    elif tokens is None:
        return None
    else:
        all_asked = sum(float(load_E.sum()) for load_E in one.counts["ranked_load"])
        asked = all_asked * place_shares(tokens.sequence if kind == "sequence" else tokens.micro_step, len(dropped))
    if asked is None:
        return None
    return np.divide(dropped, asked, out=np.full(len(dropped), np.nan), where=asked > 0)


def place_shares(length: int, parts: int) -> Floats:
    """Share of `length` tokens in each part, as moe/drops.py counts them: 20 in 16 parts are 2, 1, 1, 1, 2, ..."""
    return np.bincount(np.arange(length) * parts // length, minlength=parts) / length
