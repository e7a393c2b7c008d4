"""Curves and bars as text, against dots that are counted by hand and by a loop over every dot."""

import math

import pytest

from moe_dist.study.run.plot import bars, curve


def dots(line: str) -> list[tuple[int, int]]:
    """(x, y from the top) of every dot of a line of braille."""
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]  # of Unicode's bits 1, 2, 4, ...
    found = []
    for place, letter in enumerate(line):
        bits = ord(letter) - 0x2800 if letter != " " else 0
        found += [(2 * place + x, y) for bit, (x, y) in enumerate(order) if bits >> bit & 1]
    return found


def test_a_diagonal() -> None:
    lines = curve([(1, 0.0), (4, 3.0)], width=5, height=1)
    assert lines == ["3 │⡠⠊", "   1 4"]  # two cells of 2 x 4 dots: one dot in each column
    assert sorted(dots("⡠⠊")) == [(0, 3), (1, 2), (2, 1), (3, 0)]


@pytest.mark.parametrize("count", [2, 7, 300])
def test_every_value_lies_where_it_belongs(count: int) -> None:
    width, height = 40, 6
    points = [(float(step), math.sin(step / 3) + step / 9) for step in range(1, count + 1)]
    *drawn, ends = curve(points, width, height)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = drawn[0].index("│") + 1
    assert drawn[0].split()[0].rstrip("│") == f"{high:.4g}" and drawn[-1].split("│")[0].strip() == f"{low:.4g}"
    assert ends.split() == ["1", str(count)] and max(map(len, drawn)) <= width
    seen = {(x, 4 * row + y) for row, line in enumerate(drawn) for x, y in dots(line[margin:])}
    columns, rows = 2 * (width - margin), 4 * height
    for x, y in points:
        across = min(columns - 1, int((x - 1) / (count - 1) * columns))
        up = min(rows - 1, int((y - low) / (high - low) * rows))
        assert (across, rows - 1 - up) in seen
    assert {x for x, _ in seen} == set(range(columns))  # joined


def test_what_is_no_number_is_left_out() -> None:
    assert curve([], 20, 3) == [] and curve([(1, math.nan)], 20, 3) == []
    assert curve([(1, 2.0), (2, math.inf), (3, 2.0)], 20, 2) == curve([(1, 2.0), (3, 2.0)], 20, 2)
    assert curve([(1, 0.0), (4, 3.0)], width=5, height=1, plain=True) == ["3 |**", "   1 4"]


def test_bars() -> None:
    assert bars([0.0, 0.25, 0.5, 1.0, 3.0], 1.0, 80) == "▁▃▅██"
    assert bars([0, 1, 0, 0, 1, 0], 1.0, 3) == "█▁█" and bars([0, 0], 0.0, 9) == "▁▁"
    assert bars([0.0, 0.5, 1.0], 1.0, 80, plain=True) == ".+@"
