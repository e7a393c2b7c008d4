"""Which rank computes which head, by hand."""

import pytest

from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "rank", "expected"),
    [
        # Six queries on three heads over two ranks: the example of HeadAssignment.
        (6, 3, 2, 0, HeadAssignment(range(0, 3), range(0, 2), range(0, 2), True, (0, 0, 1))),
        (6, 3, 2, 1, HeadAssignment(range(3, 6), range(1, 3), range(2, 3), True, (0, 1, 1))),
        # Queries 2 and 3 of six straddle both heads; rank 0 owns the first.
        (6, 2, 3, 1, HeadAssignment(range(2, 4), range(0, 2), range(1, 2), True, None)),
        # tp divides the key/value heads: cut, nothing shared.
        (6, 2, 2, 0, HeadAssignment(range(0, 3), range(0, 1), range(0, 1), False, None)),
        (8, 4, 2, 1, HeadAssignment(range(4, 8), range(2, 4), range(2, 4), False, None)),
        # Multi-query: the one head on every rank, owned by the first.
        (4, 1, 4, 3, HeadAssignment(range(3, 4), range(0, 1), range(1, 1), True, None)),
        (4, 2, 1, 0, HeadAssignment(range(0, 4), range(0, 2), range(0, 2), False, None)),
    ],
)
def test_by_hand(heads: int, kv_heads: int, tp: int, rank: int, expected: HeadAssignment) -> None:
    found = HeadAssignment.of(heads, kv_heads, Group(tuple(range(tp)), rank))
    assert found == expected
    assert found.kv_read == (len(found.queries) if found.reads else len(found.kv_held))
