"""What the figures share: panels, and how many lines stay readable."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_dist.study.design.grid import Scalar
from moe_dist.study.page.theme import SERIES, plain, style

Item = TypeVar("Item")

LINES = 6
"""That one panel shows at most."""
PANELS = 6
"""Small multiples of one figure at most."""
_WIDTH, _HEIGHT = 3.1, 2.7
_CLOSE = 0.1
_TITLE = 34  # letters over a panel


@contextmanager
def panels(rows: int, columns: int, height: float = _HEIGHT) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """In the style of the page, inches as on paper."""
    with style():
        figure = Figure(figsize=(_WIDTH * columns, height * rows + 0.3))
        yield figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def legend(figure: Figure, axes: Axes) -> None:
    """Below all panels, of the lines in one of them."""
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3))


def panel_rows(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of so many panels."""
    columns = min(columns, count)
    return -(-count // columns), columns


def name_panel(axes: Axes, name: str) -> None:
    """In two lines where it is long."""
    middle = name.rfind(", ", 0, _TITLE)
    text = name if len(name) <= _TITLE or middle < 0 else f"{name[: middle + 1]}\n{name[middle + 2 :]}"
    axes.set_title(plain(text))


def from_zero(axes: Axes) -> None:
    """Rates and shares: an axis that starts at 0, with room above what is drawn."""
    axes.set_ylim(0, max(1.08 * axes.get_ylim()[1], 1e-9))


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a series."""
    return SERIES[number % len(SERIES)]


def places_of(values: Sequence[Scalar]) -> dict[Scalar, float]:
    """Where each value stands: numbers at themselves and null (dropless) to their right; or all in order, where they
    are no numbers or two would stand too close to read."""
    distinct = list(dict.fromkeys(values))
    numbers = sorted(value for value in distinct if isinstance(value, int | float) and not isinstance(value, bool))
    if not numbers or len(numbers) + (None in distinct) < len(distinct):
        return {value: float(place) for place, value in enumerate(distinct)}
    gaps = [right - left for left, right in pairwise(numbers)]
    if gaps and min(gaps) < _CLOSE * (numbers[-1] - numbers[0]):
        in_order: dict[Scalar, float] = {value: float(place) for place, value in enumerate(numbers)}
        return in_order | ({None: len(numbers) + 0.5} if None in distinct else {})
    places: dict[Scalar, float] = {number: float(number) for number in numbers}
    if None in distinct:
        places[None] = numbers[-1] + (fmean(gaps) if gaps else 1.0)
    return places


def spread_over(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, at equal distances, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def left_out(shown: int, of: int, what: str) -> str:
    """The sentence of a caption about what is not drawn; empty where all is."""
    return "" if shown == of else f" Drawn are {shown} of {of} {what}; the data has all."
