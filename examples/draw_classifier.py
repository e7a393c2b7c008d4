"""Draws the classifier's architecture from a model: its modules, the shapes of their parameters, and their numbers.

python examples/draw_classifier.py [CONFIG] [OUT]        default: configs/classifier.yaml, docs/classifier.svg

Nothing in the picture is written by hand but the names of the parts: change the config, and it changes.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from moe_dist.config.load import load_config
from moe_dist.data.labelled import PACKAGES
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh

INK, FAINT, LINE, PAPER = "#1b1f24", "#6a737d", "#8b949e", "#ffffff"
FILL = {"embed": "#dbeafe", "attention": "#e0e7ff", "norm": "#f3f4f6", "moe": "#ffedd5", "head": "#dcfce7"}
WIDTH, GAP = 4.6, 0.42


@dataclass(frozen=True)
class Box:
    """One part: what it is, what it holds, how tall it is drawn."""

    title: str
    detail: str
    kind: str
    height: float = 0.86


def shapes(module: nn.Module) -> str:
    """`query 128×128, out 128×128`: every parameter below `module`, by the last telling part of its name."""
    words = []
    for name, param in module.named_parameters():
        label = name.removesuffix(".weight").replace("_", " ")
        words.append(f"{label} {'×'.join(map(str, param.shape))}")
    return ",  ".join(words)


def count(*items: Any) -> str:
    """Parameters in words: 1.05M."""
    total = sum(p.numel() for item in items for p in (item.parameters() if isinstance(item, nn.Module) else [item]))
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if total >= size:
            return f"{total / size:.3g}{unit}"
    return str(total)


def draw_box(axes: Axes, x: float, y: float, width: float, box: Box, number: str = "") -> None:
    shape = FancyBboxPatch(
        (x, y),
        width,
        box.height,
        boxstyle="round,pad=0,rounding_size=0.09",
        facecolor=FILL[box.kind],
        edgecolor=LINE,
        linewidth=0.8,
    )
    axes.add_patch(shape)
    middle = y + box.height / 2
    lift = 0.13 if box.detail else 0.0
    axes.text(x + 0.18, middle + lift, box.title, va="center", fontsize=10.5, color=INK, weight="bold")
    if box.detail:
        axes.text(x + 0.18, middle - 0.17, box.detail, va="center", fontsize=7.8, color=FAINT)
    if number:
        axes.text(x + width - 0.18, middle + lift, number, va="center", ha="right", fontsize=9, color=FAINT)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    settings = {"arrowstyle": "-|>", "mutation_scale": 9, "color": LINE, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **(settings | style)))


def residual(axes: Axes, y_from: float, y_to: float) -> None:
    """Round the left of a part, from the arrow that enters it to the norm that adds it."""
    left = -0.38
    axes.plot([WIDTH / 2, left, left], [y_from, y_from, y_to], color=LINE, linewidth=1.0, solid_joinstyle="round")
    arrow(axes, (left, y_to), (0, y_to))


def draw_experts(axes: Axes, moe: MoE, layer: float, centre: float) -> None:
    """To the right of the MoE layer at height `layer`: where its router can send a token; `centre` is theirs."""
    x, config = WIDTH + 1.15, moe.config
    shown = min(config.num_experts, 8)
    each, gap = 0.34, 0.09
    low = centre + 0.12 - (shown * (each + gap) - gap) / 2
    per_expert = count(moe.experts)
    for place in range(shown):
        top = low + (shown - 1 - place) * (each + gap)
        shape = FancyBboxPatch(
            (x, top),
            1.5,
            each,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=FILL["moe"],
            edgecolor=LINE,
            linewidth=0.8,
            zorder=3,
        )
        axes.add_patch(shape)
        axes.text(
            x + 0.75, top + each / 2, f"expert {place}", ha="center", va="center", fontsize=8.5, color=INK, zorder=4
        )
        chosen = place < config.top_k
        bend = FancyArrowPatch(
            (WIDTH, layer + 0.43),
            (x, top + each / 2),
            arrowstyle="-|>",
            mutation_scale=7,
            shrinkA=0,
            shrinkB=0,
            connectionstyle="arc3,rad=0",
            color="#c2570c" if chosen else "#d0d7de",
            linewidth=1.6 if chosen else 0.8,
            zorder=2 if chosen else 1,
        )
        axes.add_patch(bend)
    top = low + shown * (each + gap) + 0.1
    axes.text(x + 0.75, top, f"{config.num_experts} experts, {per_expert}", ha="center", fontsize=8.5, color=FAINT)
    d_model = moe.experts.w_up.shape[-1]
    hidden = f"{d_model} → {moe.experts.widths[0]} → {d_model}, {moe.experts.activation}"
    axes.text(x + 0.75, low - 0.24, hidden, ha="center", fontsize=8.5, color=FAINT)
    axes.text(
        x + 0.75, low - 0.5, f"a token goes to {config.top_k}, padding to none", ha="center", fontsize=8.5, color=FAINT
    )


def draw(model: Classifier, path: Path) -> None:
    """One column from the text's tokens to its class, experts beside each MoE layer."""
    config, length = model.config, model.positions.shape[0]
    figure = Figure(figsize=(9.2, 2.4 + 1.28 * (3 + 4 * len(model.blocks)) * 0.82))
    axes = figure.add_axes((0, 0, 1, 1))
    middle, y = WIDTH / 2, 0.0

    def put(box: Box, number: str = "") -> float:
        """The next part on top of the column; returns its lower edge."""
        nonlocal y
        arrow(axes, (middle, y), (middle, y + GAP))
        draw_box(axes, 0, y + GAP, WIDTH, box, number)
        y += GAP + box.height
        return y - box.height

    axes.text(middle, -0.2, f"token ids, padded to {length}", ha="center", fontsize=9.5, color=INK, style="italic")
    embedding, positions = model.embedding.weight, model.positions
    sizes = f"{embedding.shape[0]}×{embedding.shape[1]} + {positions.shape[0]}×{positions.shape[1]}"
    put(Box("Token + position embedding", sizes, "embed"), count(embedding, positions))
    for number, block in enumerate(model.blocks):
        low = y + GAP / 2
        base = put(
            Box(
                "Self-attention",
                f"{config.num_heads} heads, {config.num_kv_heads} key/value;  {_attention(block)}",
                "attention",
            ),
            count(block.attention),
        )
        norm = put(Box("Add, RMSNorm", "", "norm", 0.46), count(block.attention_norm))
        residual(axes, base - GAP / 2, norm + 0.23)
        sparse = block.feed_forward
        if isinstance(sparse, MoE):
            router = sparse.router
            size = shapes(router).removeprefix("weight ")
            detail = f"router {size}, {sparse.config.router}, top {sparse.config.top_k}"
            name = "Switch layer" if sparse.config.top_k == 1 else "MoE layer"
            base = put(Box(name, detail, "moe"), count(router))
        else:
            base = put(Box("Feed-forward", shapes(sparse), "moe"), count(sparse))
        norm = put(Box("Add, RMSNorm", "", "norm", 0.46), count(block.feed_forward_norm))
        residual(axes, base - GAP / 2, norm + 0.23)
        frame = FancyBboxPatch(
            (-0.72, low - 0.06),
            WIDTH + 4.05,
            y - low + 0.26,
            boxstyle="round,pad=0,rounding_size=0.15",
            fill=False,
            edgecolor="#d0d7de",
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            zorder=0,
        )
        axes.add_patch(frame)
        axes.text(WIDTH + 3.12, (low + y) / 2, f"block {number}", rotation=90, va="center", fontsize=9, color=FAINT)
        if isinstance(sparse, MoE):
            draw_experts(axes, sparse, base, (low + y + 0.14) / 2 + 0.04)
        axes.plot([middle, middle], [y, y + 0.14], color=LINE, linewidth=1.0)
        y += 0.14
    put(Box("Mean over tokens", "padding left out", "head"))
    put(
        Box("Linear head", "×".join(map(str, model.head.shape)) + " + bias", "head"), count(model.head, model.head_bias)
    )
    arrow(axes, (middle, y), (middle, y + GAP))
    axes.text(
        middle, y + GAP + 0.12, f"{config.num_classes} logits", ha="center", fontsize=9.5, color=INK, style="italic"
    )
    total = f"{count(model)} parameters"
    axes.text(WIDTH + 3.33, -0.2, total, ha="right", fontsize=9.5, color=FAINT)
    axes.set_xlim(-0.95, WIDTH + 3.6)
    axes.set_ylim(-0.5, y + GAP + 0.55)
    axes.set_aspect("equal")
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "classifier", "font.family": "DejaVu Sans"}):
        figure.savefig(path, facecolor=PAPER, bbox_inches="tight", pad_inches=0.15, dpi=160, metadata=_undated(path))


def _attention(block: Any) -> str:
    names = (
        (block.attention.query.weight, "Q"),
        (block.attention.key_value.weight, "KV"),
        (block.attention.out.weight, "O"),
    )
    return ",  ".join(f"{name} {'×'.join(map(str, weight.shape))}" for weight, name in names)


def _undated(path: Path) -> dict[str, None]:
    return {"Date": None} if path.suffix == ".svg" else {}


def main(config: str = "configs/classifier.yaml", out: str = "docs/classifier.svg") -> None:
    loaded = load_config(config)
    settings = replace(loaded.model, num_classes=loaded.model.num_classes or len(PACKAGES))
    model = Classifier(resolve_backends(settings, 1), single_process_mesh(), loaded.train.seq_len)
    draw(model, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
