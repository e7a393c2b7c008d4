"""Memory and time of a plan, by part: bars with their numbers, as SVG for pages and PNG for letters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from moe_dist.plan.plan import Plan
from moe_dist.plan.size import size, span
from moe_dist.plan.time import EXCHANGES

_COMPUTED, _EXCHANGED, _LIMIT = "#4878a8", "#c8773c", "#a03030"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moe_dist",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_FORMATS = ("svg", "png")
_SHOWN = 0.002  # share of the largest bar below which a part is left out


def write_figures(plan: Plan, folder: Path) -> list[Path]:
    """memory and time, each in both formats, into `folder`, which is made if need be. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("memory", memory_figure(plan)), ("time", time_figure(plan))):
        for form in _FORMATS:
            path = folder / f"{name}.{form}"
            with rc_context(_STYLE):
                # The same plan gives the same bytes.
                figure.savefig(path, dpi=200, metadata={"Date": None} if form == "svg" else None)
            written.append(path)
    return written


def memory_figure(plan: Plan) -> Figure:
    """Of the fullest rank; the line is what a rank has."""
    gib = {part: value / 2**30 for part, value in plan.memory.parts.items()}
    title = f"memory of rank {plan.rank}: {size(plan.memory.total)} of {size(plan.hardware.memory.usable)}"
    figure = _bars(gib, {part: size(value * 2**30) for part, value in gib.items()}, title, "GiB")
    axes, usable = figure.axes[0], plan.hardware.memory.usable / 2**30
    axes.axvline(usable, color=_LIMIT, linewidth=1)
    axes.annotate("a rank has", (usable, 0), (-4, 0), textcoords="offset points", color=_LIMIT, ha="right", fontsize=8)
    return figure


def time_figure(plan: Plan) -> Figure:
    """Of one optimizer step; exchanges in another colour."""
    time = plan.time
    parts = time.parts | ({"hidden behind compute": -time.hidden} if time.hidden else {})
    title = f"a step of {span(time.seconds)}, MFU {time.mfu:.1%}"
    ms = {part: 1e3 * seconds for part, seconds in parts.items()}
    told = {part: ("-" if seconds < 0 else "") + span(abs(seconds)) for part, seconds in parts.items()}
    return _bars(ms, told, title, "ms", (*EXCHANGES, "hidden behind compute"))


def _bars(
    values: Mapping[str, float], told: Mapping[str, str], title: str, unit: str, other: Sequence[str] = ()
) -> Figure:
    """Largest on top. other: parts in the second colour."""
    most = max(map(abs, values.values()))
    shown = sorted((part for part in values if abs(values[part]) >= _SHOWN * most), key=lambda part: values[part])
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.27 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        colours = [_EXCHANGED if part in other else _COMPUTED for part in shown]
        bars = axes.barh(shown, [values[part] for part in shown], color=colours)
        axes.bar_label(bars, [told[part] for part in shown], padding=3, fontsize=8)
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left")
        axes.margins(x=0.14)
    return figure
