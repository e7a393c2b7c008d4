"""What a rank exchanges in one optimizer step, in the words that the plan, the recorder and the dry run share.

Bytes are what a rank hands in. What of it leaves the rank follows from the usual algorithms, for n ranks (Thakur,
Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005):

| collective     | bytes are of                              | leave the rank       | by            |
|----------------|-------------------------------------------|----------------------|---------------|
| all_reduce     | the tensor                                | 2 (n - 1) / n of it  | ring          |
| all_gather     | its own slice                             | (n - 1) times it     | ring          |
| reduce_scatter | the whole input                           | (n - 1) / n of it    | ring          |
| reduce         | the tensor                                | (n - 1) / n of it    | ring, chunks  |
| broadcast      | the tensor                                | (n - 1) / n of it    | ring, chunks  |
| all_to_all     | all it sends, its own part included       | (n - 1) / n of it    | pairs         |
| barrier        | nothing                                   | nothing              |               |

A ring visits ranks in order. On nodes of consecutive ranks it leaves each node once, so a group with g ranks on every
node sends 1 / g of its bytes between nodes; of all pairs it sends (n - g) / (n - 1) between them.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from moe_dist.parallel.mesh import Axis

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "broadcast", "all_to_all", "barrier"]
Phase = Literal["forward", "backward", "gradients", "update", "statistics"]
"""When in a step: forward and backward with what is computed again, the reduction of gradients, the update with its
norm, and what is counted for logs and guards."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Calls of one collective in one optimizer step, as one rank enters them.

    axis, ranks: of the group. what: for people, "rows to experts". calls: in one optimizer step. bytes: the sum over
    them of what this rank hands in, as the table above says.
    """

    collective: Collective
    axis: Axis
    ranks: tuple[int, ...]
    phase: Phase
    what: str
    calls: int
    bytes: int

    @property
    def wire_bytes(self) -> int:
        """Bytes that leave this rank, over all calls; of an all-to-all, where all ranks are sent as much."""
        return wire_bytes(self.collective, self.bytes, len(self.ranks))


def wire_bytes(collective: Collective, size: int, ranks: int) -> int:
    """Bytes that leave a rank which hands in `size` bytes in a group of `ranks`."""
    whole, parts = _share(collective, ranks)
    return _rounded(whole * size, parts)


def links(transfer: Transfer, ranks_per_node: int) -> tuple[int, int]:
    """(bytes inside a node, bytes between nodes) that leave this rank; their sum is transfer.wire_bytes.

    A rank's share where only one of a node speaks to the next: the sum over a node's ranks is what passes its network.
    Nodes hold `ranks_per_node` consecutive ranks. Raises ValueError when that is below 1.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node={ranks_per_node} is below 1; give how many ranks share a machine")
    total = transfer.wire_bytes
    across, all_sent = _between(transfer.collective == "all_to_all", transfer.ranks, ranks_per_node)
    between = _rounded(total * across, all_sent)
    return total - between, between


def _share(collective: Collective, ranks: int) -> tuple[int, int]:
    """(numerator, denominator)"""
    if collective == "all_gather":
        return ranks - 1, 1
    return (2 if collective == "all_reduce" else 1) * (ranks - 1), ranks


@lru_cache(maxsize=4096)
def _between(pairs: bool, ranks: tuple[int, ...], ranks_per_node: int) -> tuple[int, int]:
    """(numerator, denominator) of what of all that leaves a rank goes to another node, on the average over the group.
    pairs: an all-to-all."""
    nodes, n = [rank // ranks_per_node for rank in ranks], len(ranks)
    if n == 1:
        return 0, 1
    if pairs:
        return sum(held * (n - held) for held in Counter(nodes).values()), n * (n - 1)
    return sum(here != there for here, there in zip(nodes, nodes[1:] + nodes[:1], strict=True)), n


def _rounded(numerator: int, denominator: int) -> int:
    """Their quotient, to the nearest whole number, halves to the even one."""
    whole, rest = divmod(numerator, denominator)
    return whole + (2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))
