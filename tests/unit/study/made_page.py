"""A page with a part of every kind."""

import numpy as np
from matplotlib.figure import Figure as Drawing

from moe_dist.study.page.model import Figure, Notice, Page, Prose, Section, Table
from moe_dist.study.page.theme import SERIES, heat_map, plain, style, svg_of

HOSTILE = "</svg><script>alert(1)</script> $x$"


def curve(name: str = "curve", label: str = "first") -> Figure:
    rows = [("first", step, 1.0 / step) for step in range(1, 9)]
    with style():
        drawing = Drawing(figsize=(9, 3))
        left, right = drawing.subplots(1, 2)
        for number, (color, marker) in enumerate(SERIES):
            left.plot([row[1] for row in rows], [row[2] + number for row in rows], color=color, marker=marker)
        left.fill_between([1, 8], [0, 0], [1, 2], color=SERIES[0][0], alpha=0.2)
        left.set_title(plain(label))
        left.set_xlabel("step")
        mesh = heat_map(right, np.arange(12.0).reshape(3, 4), 0.0, 11.0)
        drawing.colorbar(mesh, ax=right, label="load")
        svg = svg_of(drawing)
    return Figure(
        name=name,
        title=f"Curve of **{label}**",
        caption="Falls with **every** step of `curve`.",
        svg=svg,
        columns=("series", "step", "value"),
        rows=rows,
    )


def points(count: int = 500) -> Table:
    """The rows are in no order of their numbers: step time goes up and down, and every seventh has no drop rate."""
    rows = [
        (
            f"num_experts={4 << i % 3}-capacity_factor={1 + i % 4}.5-seed={i}",
            (i * 37) % count - 3,
            None if i % 7 == 0 else (i * 53 % 100) / 100,
            f"{(i * 11) % 90 + 5.5:.1f} ± 0.3 ms",
            ("finished", "failed", "item 10", "item 9")[i % 4],
            1_000_000 * i,
            2.0 + i / 3,
            "a long remark that does not break lightly",
        )
        for i in range(count)
    ]
    return Table(
        name="points",
        title="Every point",
        columns=("point", "order", "dropped", "step", "state", "rows to experts (bytes)", "loss", "remark"),
        rows=rows,
        formats={"dropped": ".1%", "rows to experts (bytes)": ",d", "loss": ".4f"},
        note="`dropped` is a share.",
    )


def whole_page() -> Page:
    return Page(
        title="capacity-<b>cpu</b>",
        lead=[
            Prose(["A factor of **1.0** costs 0.01 nats: `capacity_factor`.", "12 of 12 points have finished."]),
            Notice("good", ["The books balance."]),
            Notice("violation", ["Two points were trained on other data."]),
        ],
        sections=[
            Section("The question", [curve(), Notice("warning", ["Few seeds."])]),
            Section("Scaling & more", [points(), curve("other", HOSTILE)], exploratory=True),
            Section("The question", [Prose(["Once more."])]),
        ],
        again=["moe-dist study run study.yaml", "moe-dist study report study.yaml --with-a-flag " + "long" * 60],
        setting=Table(
            name="setting", title="Setting", columns=("what", "value"), rows=[("torch", "2.13.0"), ("a", "b|c")]
        ),
    )
