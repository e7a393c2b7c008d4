"""How well a classifier does, from its confusion matrix: accuracy, F1, a picture.

Legend: C classes. counts_CC[i, j]: texts of class i that were taken for class j.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_dist.disk import replace_text

_INK, _FAINT = "#1b1f24", "#6a737d"


def accuracy(counts_CC: np.ndarray) -> float:
    """Share of texts on the diagonal."""
    return float(np.trace(counts_CC) / counts_CC.sum())


def f1_scores(counts_CC: np.ndarray) -> np.ndarray:
    """[C]: 2 TP / (2 TP + FP + FN); NaN for a class that neither occurs nor is predicted."""
    both = counts_CC.sum(0) + counts_CC.sum(1)  # 2 TP + FP + FN
    return np.where(both > 0, 2 * np.diag(counts_CC) / np.maximum(both, 1), np.nan)


def macro_f1(counts_CC: np.ndarray) -> float:
    """The mean of F1 over classes that occur or are predicted, each counting the same."""
    return float(np.nanmean(f1_scores(counts_CC)))


def write_confusion(folder: Path, counts_CC: np.ndarray, labels: Sequence[str], title: str) -> str | None:
    """confusion.json and confusion.png. Why they could not be written, if so: nobody ends a run for a picture."""
    try:
        _write_confusion(folder, counts_CC, labels, title)
    except Exception as error:  # the drawing library has many of its own
        return f"warning: confusion.json and confusion.png are not in {folder}: {error}"
    return None


def _write_confusion(folder: Path, counts_CC: np.ndarray, labels: Sequence[str], title: str) -> None:
    scores = f1_scores(counts_CC)
    record = {
        "labels": list(labels),
        "counts": counts_CC.tolist(),
        "accuracy": accuracy(counts_CC),
        "macro_f1": macro_f1(counts_CC),
        "f1": {label: None if np.isnan(score) else float(score) for label, score in zip(labels, scores, strict=True)},
    }
    replace_text(folder / "confusion.json", json.dumps(record, indent=1))
    draw_confusion(folder / "confusion.png", counts_CC, labels, title)


def draw_confusion(path: Path, counts_CC: np.ndarray, labels: Sequence[str], title: str) -> None:
    """Rows are true classes, shaded by the share of their texts; numbers are counts, F1 stands at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: the import takes half a second
    from matplotlib.figure import Figure

    size, scores = len(labels), f1_scores(counts_CC)
    share_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(2.6 + 0.62 * size, 2.0 + 0.56 * size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
    small = size <= 20
    for i, j in np.ndindex(size, size) if small else ():
        if counts_CC[i, j]:
            colour = "white" if share_CC[i, j] > 0.55 else _INK
            axes.text(j, i, f"{counts_CC[i, j]}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(size), labels, rotation=40, ha="right", rotation_mode="anchor", color=_INK)
    axes.set_yticks(range(size), labels, color=_INK)
    axes.set_xlabel("predicted", color=_FAINT)
    axes.set_ylabel("true", color=_FAINT)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if small:
        for i, score in enumerate(scores):
            shown = "" if np.isnan(score) else f"{score:.2f}"
            axes.text(size - 0.35, i, shown, ha="left", va="center", color=_FAINT, fontsize=9)
        axes.text(size - 0.35, -0.75, "F1", ha="left", va="center", color=_FAINT, fontsize=9)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=18)
    figure.savefig(path, dpi=160)
