"""Figures of the benchmarks: horizontal bars, ours in colour, the bound as a line."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, PEERS, INK = "#1f6fb2", "#c3c9d0", "#333333"
LONGEST = 3.2
"""Ratio at which bars are cut; longer ones carry their number."""


def draw_cells(data: dict[str, Any], path: Path) -> None:
    """One panel per cell of moe_layer.json: time over the dense bound, shorter is better. Writes .svg and .png."""
    cells = [cell for cell in data["cells"].values() if "T 4096" in cell["cell"]]
    cells.sort(key=lambda cell: (cell["cell"][:3], "bf16" in cell["cell"], "capacity" in cell["cell"]))
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK})
    rows = -(-len(cells) // 2)
    heights = [max(len(cell["seconds"]) for cell in cells[2 * row : 2 * row + 2]) for row in range(rows)]
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(11, 0.27 * sum(heights) + 0.75 * rows + 0.9),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, cell in zip(axes.flat, cells, strict=False):
        _panel(axis, cell)
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("time / dense MLP of the same arithmetic")
    machine = data["machine"]
    figure.suptitle(
        f"One MoE layer, forward + backward, 4096 new tokens a step. {machine['device']}, {machine['threads']} threads",
        fontsize=11,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path.with_suffix(".svg"))
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


def _panel(axis: Axes, cell: dict[str, Any]) -> None:
    seconds, notes = dict(cell["seconds"]), cell["notes"]
    bound = seconds.pop("dense bound")
    names = sorted(seconds, key=lambda name: seconds[name], reverse=True)
    ratios = [seconds[name] / bound for name in names]
    colors = [OURS if name.startswith("moe_dist") else PEERS for name in names]
    axis.barh(range(len(names)), [min(ratio, LONGEST) for ratio in ratios], color=colors, height=0.72)
    for index, ratio in enumerate(ratios):
        cut = " →" if ratio > LONGEST else ""
        axis.text(min(ratio, LONGEST) + 0.03, index, f"{ratio:.2f}{cut}", va="center", fontsize=8.5)
    axis.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_yticks(range(len(names)), [f"{name}*" if name in notes else name for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, LONGEST + 0.45)
    axis.spines[["top", "right", "left"]].set_visible(False)
    letter, rule = cell["cell"][:3], cell["cell"][4:].rsplit(", T", 1)[0]
    suffix = "   * drops nothing" if notes else ""
    axis.set_title(f"{letter} {cell['title']}\n{rule}{suffix}", fontsize=9, loc="left")
