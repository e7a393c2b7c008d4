"""What each rank of a tensor-parallel layer holds: together every row once, and each query head reads its own keys."""

import pytest
import torch

from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group
from moe_dist.standalone.multi_query.parts import qkv_part

SIZES = [
    (heads, kv_heads, tp)
    for heads in (1, 2, 4, 6, 8, 12)
    for kv_heads in range(1, heads + 1)
    for tp in range(1, heads + 1)
    if heads % kv_heads == heads % tp == 0
]


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), SIZES)
def test_rows_of_all_ranks(heads: int, kv_heads: int, tp: int) -> None:
    """In a fused weight whose every row is its own number, with heads of width 2."""
    width, total = 2, (heads + 2 * kv_heads) * 2
    whole, owned, holders = torch.arange(total), torch.zeros(total), torch.zeros(total)
    for rank in range(tp):
        mine = HeadAssignment.of(heads, kv_heads, Group(tuple(range(tp)), rank))
        part = qkv_part(mine, heads, kv_heads, width)
        rows = part.take(whole)
        owned[rows[part.owned_N]] += 1
        holders[rows] += 1
        queries, keys, values = (
            block.view(-1, width)
            for block in rows.split([width * len(held) for held in (mine.queries, mine.kv_held, mine.kv_held)])
        )
        each = len(mine.queries) // len(mine.kv_held)
        for local, query in enumerate(queries.tolist()):
            head = query[0] // width
            assert head == rank * heads // tp + local
            read = mine.reads[local] if mine.reads is not None else local // each
            expected = heads + head // (heads // kv_heads)
            assert keys[read].tolist() == [expected * width, expected * width + 1]
            assert values[read].tolist() == [(expected + kv_heads) * width, (expected + kv_heads) * width + 1]
    assert owned.eq(1).all()
    assert mine.shared or holders.eq(1).all()  # what is not summed over ranks is on one rank
