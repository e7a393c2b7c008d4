"""A computed order: each thing once, and no pattern in it."""

from collections import Counter
from collections.abc import Sequence
from math import isqrt, sqrt

import numpy as np
import pytest

from moe_dist.data.permutation import ROUNDS, permuted


def keys(number: int) -> list[int]:
    return np.random.default_rng(number).integers(0, 2**64, ROUNDS, dtype=np.uint64).tolist()


def by_hand(place: int, size: int, keys: Sequence[int]) -> int:
    """The same in whole numbers of Python, one place at a time."""

    def scrambled(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    row, column = divmod(place, columns)
    for turn in range(0, len(keys), 2):
        row = (row + scrambled(column ^ keys[turn])) % rows
        column = (column + scrambled(row ^ keys[turn + 1])) % columns
    cell = row * columns + column
    return cell if cell < size else by_hand(cell, size, keys)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 9, 10, 16, 17, 99, 100, 101, 10_000, 10_007, 65_536, 65_537])
def test_each_place_has_its_own(size: int) -> None:
    for number in range(3):
        found = permuted(np.arange(size), size, keys(number))
        assert found.dtype == np.int64 and (np.sort(found) == np.arange(size)).all()


@pytest.mark.parametrize("size", [2, 10, 1000, 10**6 + 3, 73_242_186, 2**40 + 1, 2**62])
def test_is_what_whole_numbers_of_python_say(size: int) -> None:
    places = [0, 1, size // 3, size - 2, size - 1]
    assert permuted(np.array(places), size, keys(1)).tolist() == [by_hand(p, size, keys(1)) for p in places]


def test_the_order_looks_random() -> None:
    """Fixed seeds: the bounds are four to five standard deviations of a random order."""
    size = 200_000
    for number in range(3):
        order_N = permuted(np.arange(size), size, keys(number))
        assert (order_N == np.arange(size)).sum() < 8  # 1 is expected
        assert (np.abs(np.diff(order_N)) == 1).sum() < 12  # 2 neighbours stay neighbours
        assert abs((np.diff(order_N) > 0).sum() - size / 2) < 5 * sqrt(size / 12)
        for lag in (1, 2, isqrt(size), isqrt(size) + 1):
            assert abs(np.corrcoef(order_N[:-lag], order_N[lag:])[0, 1]) < 5 / sqrt(size)
        counts, _, _ = np.histogram2d(np.arange(size), order_N, bins=20)
        assert ((counts - size / 400) ** 2 / (size / 400)).sum() < 361 + 5 * sqrt(2 * 361)


def test_every_order_of_four_comes_up_alike() -> None:
    seen = Counter(tuple(permuted(np.arange(4), 4, keys(number)).tolist()) for number in range(4800))
    assert len(seen) == 24 and min(seen.values()) > 140 and max(seen.values()) < 265
