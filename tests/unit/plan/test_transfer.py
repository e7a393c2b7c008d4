from collections import defaultdict

import pytest

from moe_dist.plan.transfer import Collective, Transfer, links, wire_bytes

Sends = dict[tuple[int, int], int]
"""Bytes by (from, to), as places in the group."""


def by_algorithm(collective: Collective, size: int, n: int) -> Sends:
    """Step by step, what the textbook's algorithms send; size divides by n."""
    sends: Sends = defaultdict(int)
    if collective == "all_to_all":
        for here in range(n):
            for there in range(n):
                sends[here, there] += size // n if here != there else 0
        return sends
    rounds = {"all_reduce": 2 * (n - 1), "reduce_scatter": n - 1, "all_gather": n - 1}[collective]
    for _ in range(rounds):  # a chunk to the next on the ring
        for here in range(n):
            sends[here, (here + 1) % n] += size if collective == "all_gather" else size // n
    return sends


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"])
@pytest.mark.parametrize("ranks", [tuple(range(8)), (0, 4, 8, 12), (1, 2, 3), tuple(range(4, 12)), (5,)])
def test_bytes_on_links_are_those_of_the_algorithms(collective: Collective, ranks: tuple[int, ...]) -> None:
    """For one rank, and between nodes of four ranks each on the average over the group."""
    n, size = len(ranks), 840
    sends = by_algorithm(collective, size, n) if n > 1 else {}
    out = sum(bytes for (here, _), bytes in sends.items() if here == 0)
    transfer = Transfer(collective, "ep", ranks, "forward", "", 1, size)
    assert transfer.wire_bytes == wire_bytes(collective, size, n) == out
    across = sum(bytes for (here, there), bytes in sends.items() if ranks[here] // 4 != ranks[there] // 4)
    inside, between = links(transfer, ranks_per_node=4)
    assert inside + between == out
    assert between == pytest.approx(across / n, abs=1)


def test_a_node_has_a_rank() -> None:
    with pytest.raises(ValueError, match="ranks_per_node=0 is below 1"):
        links(Transfer("all_reduce", "dp", (0, 1), "gradients", "", 1, 8), 0)
