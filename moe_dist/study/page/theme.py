"""How a page and its figures look: one set of colours for light and for dark paper, and figures that change with them.

A figure is drawn once, in the colours of light paper. `svg_of` then puts a CSS variable in the place of each colour of
the theme, so that the page's own rule for dark paper turns the figure too. `standalone` goes back: an SVG file with
fixed colours on paper of its own, which reads on any ground.

Series are told apart by colour and by marker. Colours: B. Wong, "Points of view: Color blindness", Nature Methods 8,
441 (2011), after Okabe and Ito; a little darker on light paper and lighter on dark, where they would lack contrast.
The colours of heat maps go from the paper to the far end of one hue: little is pale on light paper, and dim on dark.
"""

import hashlib
import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

INK, FAINT, RULE, PAPER = "#1f2328", "#5d6570", "#dfe2e6", "#ffffff"
"""Text and axes; second things; grids; ground: of light paper."""

SERIES = [
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#00855f", "^"),
    ("#b4578f", "D"),
    ("#a87400", "v"),
    ("#2f8fc4", "P"),
    ("#6b6f76", "X"),
    ("#6a4fb3", "*"),
]
"""(colour, marker) of the first series, the second, ...; take them modulo the length."""

_SERIES_DARK = ["#56a8e0", "#f0813a", "#33bd92", "#dd8fbd", "#e0ac3c", "#8fd0f5", "#a3a9b3", "#a996ea"]
_LEVELS = 32
_PIXELS = 4 / 3
"""Of a point, in which matplotlib counts."""
_HEAT_LIGHT = ["#f3f6fa", "#c6dcef", "#7db4dc", "#2f7fbd", "#12528f", "#0a2a52"]
_HEAT_DARK = ["#1d232b", "#1c3b5c", "#1f5f96", "#3a8ecb", "#86c3ee", "#e6f4ff"]


def _between(stops: list[str], count: int) -> list[str]:
    """count colours at equal distances on the line through the stops."""
    rgb = np.array([to_rgb(stop) for stop in stops])
    places = np.linspace(0, len(stops) - 1, count)
    mixed = np.stack([np.interp(places, range(len(stops)), rgb[:, channel]) for channel in range(3)], axis=1)
    return [matplotlib.colors.to_hex(colour) for colour in mixed]


LIGHT: dict[str, str] = {
    "ink": INK,
    "faint": FAINT,
    "rule": RULE,
    "paper": PAPER,
    "shade": "#f5f6f8",
    "violation-ink": "#b3261e",
    "warning-ink": "#8a5a00",
    "good-ink": "#1a7346",
    **{f"series-{number}": colour for number, (colour, _) in enumerate(SERIES)},
    **{f"heat-{level}": colour for level, colour in enumerate(_between(_HEAT_LIGHT, _LEVELS))},
}
"""Name of the CSS variable -> colour on light paper."""

DARK: dict[str, str] = {
    "ink": "#e3e6ea",
    "faint": "#9aa3ae",
    "rule": "#30363d",
    "paper": "#14171b",
    "shade": "#1c2026",
    "violation-ink": "#ff8a80",
    "warning-ink": "#e8b450",
    "good-ink": "#5fcf94",
    **{f"series-{number}": colour for number, colour in enumerate(_SERIES_DARK)},
    **{f"heat-{level}": colour for level, colour in enumerate(_between(_HEAT_DARK, _LEVELS))},
}

HEAT = ListedColormap([LIGHT[f"heat-{level}"] for level in range(_LEVELS)], name="moe_dist_heat")
"""For numbers that have a least one: shares, loads, rates. For text over it: ink below the middle, paper above."""

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
_VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()} | {"#000000": "var(--ink)"}
_LAID_OUT: Any = {"figure.constrained_layout.use": False, "figure.autolayout": False}
_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same layout on every machine
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.prop_cycle": cycler(color=[colour for colour, _ in SERIES]),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "text.color": INK,
    "patch.edgecolor": INK,
    "lines.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.markeredgewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "image.cmap": "viridis",
    "svg.fonttype": "none",  # text stays text: found by a search, read aloud, in the page's own font
    "svg.hashsalt": "moe_dist",  # else the names inside the file are random
}


def style() -> AbstractContextManager[None]:
    """Make and draw figures within it: `with style(): ...`."""
    return matplotlib.rc_context(_SETTINGS)


def heat_map(axes: Axes, values: ArrayLike, low: float, high: float) -> QuadMesh:
    """values [rows, columns], the first row on top; NaN stays empty. Every cell is a shape of its own, so that its
    colour follows the theme. Returns what a colour bar takes."""
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(np.asarray(values, dtype=float)),
        cmap=HEAT,
        norm=Normalize(low, high),
        edgecolors=PAPER,
        linewidth=0.6,
    )
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return mesh


def svg_of(figure: Figure) -> str:
    """The figure as `<svg>...</svg>` to stand in a page: colours are CSS variables, nothing applies beyond it, and its
    names meet no other figure's. The same figure gives the same bytes."""
    file = io.StringIO()
    engine = figure.get_layout_engine()
    with style(), matplotlib.rc_context(_LAID_OUT):
        if engine is not None:  # once: a second time would move things a little, and takes as long as the drawing does
            engine.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # its rule for * would be the page's
    text = re.sub(r"<defs>\s*</defs>", "", text)
    text = re.sub(r"<[^>]*>", lambda tag: _shorter(tag[0]), text)  # what stands between tags is read: 0.00015 stays so
    text = _own_names(text)
    width, height = _size(text)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width * _PIXELS:g}" height="{height * _PIXELS:g}" viewBox="0 0 {width:g} {height:g}" '
        'style="fill: var(--ink); stroke-linejoin: round; stroke-linecap: butt">'
    )
    return head + re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :])


def standalone(svg: str) -> str:
    """What svg_of gave, as a file: fixed colours on a ground of light paper, and fonts of its own."""
    text = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: LIGHT.get(found[1], found[0]), svg)
    head, body = text.split(">", 1)
    ground = f'<rect width="100%" height="100%" rx="6" style="fill: {PAPER}"/>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head} font-family="{FONTS}">\n{ground}{body}\n'


def plain(text: str) -> str:
    """For text of others in a figure, in which matplotlib would take $ for mathematics, and in legends leaves out what
    begins with a low line."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _shorter(tag: str) -> str:
    """Of the theme's colours their variables, of places three digits, of fonts the page's own."""
    tag = re.sub(r"; font-family: [^;\"]*", "", tag)
    tag = re.sub(r"-?\d+\.\d{4,}", lambda found: f"{float(found[0]):.3f}".rstrip("0").rstrip("."), tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), tag)


def _own_names(text: str) -> str:
    """Without ids that nothing refers to; the others begin with a digest of the figure."""
    used = dict.fromkeys(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8]
    names = {old: f"{prefix}-{number}" for number, old in enumerate(used)}
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", text)
    return re.sub(r'(href="#|url\(#)([^")]+)', lambda found: found[1] + names[found[2]], text)


def _size(text: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert found is not None, "matplotlib says how large an SVG is"
    return float(found[1]), float(found[2])
