"""A random order of any number of things that is computed where it is asked for, and never written down.

Place p of the order is found as a cipher finds it: p is written as (row, column) of a table that is hardly larger than
`size`, and in turns the row is moved by a keyed hash of the column and the column by one of the row. Each move can be
undone, so the table is permuted. What falls outside `size` is moved again until it falls inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", CT-RSA 2002, a Feistel network with cycle walking).

    size 10:  4 rows, 3 columns      place 7 = row 2, column 1      cells 10 and 11 are outside
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np

ROUNDS = 8


def permuted(places_N: np.ndarray, size: int, keys: Sequence[int]) -> np.ndarray:
    """What stands at these places of the order of 0 .. size - 1 that belongs to `keys`; both int64. keys: ROUNDS random
    numbers of 64 bits."""
    assert len(keys) == ROUNDS
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    found_N = places_N.astype(np.uint64)
    outside_N = np.ones(len(found_N), bool)
    while outside_N.any():
        found_N[outside_N] = _moved(found_N[outside_N], rows, columns, keys)
        outside_N = found_N >= size
    return found_N.astype(np.int64)


def _moved(cell_N: np.ndarray, rows: int, columns: int, keys: Sequence[int]) -> np.ndarray:
    row_N: np.ndarray = cell_N // np.uint64(columns)
    column_N: np.ndarray = cell_N % np.uint64(columns)
    for turn, key in enumerate(keys):
        if turn % 2:
            column_N = (column_N + _hash(row_N, key) % np.uint64(columns)) % np.uint64(columns)
        else:
            row_N = (row_N + _hash(column_N, key) % np.uint64(rows)) % np.uint64(rows)
    return row_N * np.uint64(columns) + column_N


def _hash(values_N: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014); products wrap around."""
    z_N = values_N ^ np.uint64(key)
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_N ^ (z_N >> np.uint64(31))
