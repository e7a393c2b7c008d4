"""Curves and bars as text, for a terminal.

braille    2 x 4 dots in a character: dot (x, y) of a cell, y downwards, is a bit of U+2800
bars       ▁▂▃▄▅▆▇█, one character a value
plain      `*` and `.:-=#`, where the terminal's encoding has neither
"""

import math
from collections.abc import Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # [x][y] of a cell
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"


def curve(points: Sequence[tuple[float, float]], width: int, height: int, plain: bool = False) -> list[str]:
    """The points (x, y) joined to a line, as `height` lines of `width` characters, the highest y first. Each line opens
    with the y at its end of the axis; a last line has the ends of x. Points whose y is not finite are left out; empty
    of none."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return []
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    labels = [f"{max(ys):.4g}", f"{min(ys):.4g}"]
    margin = max(map(len, labels))
    columns = max(1, width - margin - 2)
    cells = [[0] * columns for _ in range(height)]
    for x, y in _joined([(_place(x, xs, 2 * columns), _place(y, ys, 4 * height)) for x, y in finite]):
        down = 4 * height - 1 - y
        cells[down // 4][x // 2] |= _DOTS[x % 2][down % 4]
    heads = [labels[0], *[""] * (height - 2), labels[1]] if height > 1 else [labels[0]]
    drawn = ["".join(_cell(bits, plain) for bits in row).rstrip() for row in cells]
    bar = "|" if plain else "│"
    first, last = f"{xs[0]:.10g}", f"{xs[-1]:.10g}"
    lines = [f"{head:>{margin}} {bar}{row}" for head, row in zip(heads, drawn, strict=True)]
    return [*lines, f"{'':{margin}}  {first}{last:>{max(len(last) + 1, columns - len(first))}}"]


def bars(values: Sequence[float], highest: float, width: int, plain: bool = False) -> str:
    """One character a value, `highest` the full one. Of more than `width` values, neighbours share a character, which
    shows the largest of them.

    >>> bars([0.0, 1.0, 2.0], 2.0, 80)
    '▁▅█'
    """
    marks, size = _PLAIN_BARS if plain else _BARS, max(1, math.ceil(len(values) / width))
    shown = [max(values[at : at + size]) for at in range(0, len(values), size)]
    return "".join(marks[min(7, int(8 * value / highest))] if highest > 0 else marks[0] for value in shown)


def _place(value: float, among: Sequence[float], dots: int) -> int:
    """Which of `dots` dots from the lowest to the highest value."""
    low, high = min(among), max(among)
    return min(dots - 1, int((value - low) / (high - low) * dots)) if high > low else 0


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every dot, and between neighbours those of a straight line."""
    found = list(dots[:1])
    for (x, y), (to_x, to_y) in pairwise(dots):
        steps = max(abs(to_x - x), abs(to_y - y), 1)
        found += [(x + (to_x - x) * step // steps, y + (to_y - y) * step // steps) for step in range(1, steps + 1)]
    return found


def _cell(bits: int, plain: bool) -> str:
    return " " if not bits else "*" if plain else chr(0x2800 + bits)
