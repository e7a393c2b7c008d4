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
from fractions import Fraction
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
    return round(_share(collective, ranks) * size)


def links(transfer: Transfer, ranks_per_node: int) -> tuple[int, int]:
    """(bytes inside a node, bytes between nodes) that leave this rank; their sum is transfer.wire_bytes.

    A rank's share where only one of a node speaks to the next: the sum over a node's ranks is what passes its network.
    Nodes hold `ranks_per_node` consecutive ranks. Raises ValueError when that is below 1.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node={ranks_per_node} is below 1; give how many ranks share a machine")
    total = transfer.wire_bytes
    between = round(total * _between(transfer, ranks_per_node))
    return total - between, between


def _share(collective: Collective, ranks: int) -> Fraction:
    if collective == "all_gather":
        return Fraction(ranks - 1)
    return Fraction((2 if collective == "all_reduce" else 1) * (ranks - 1), ranks)


def _between(transfer: Transfer, ranks_per_node: int) -> Fraction:
    """Share of what leaves a rank that goes to another node, on the average over the group."""
    nodes, n = [rank // ranks_per_node for rank in transfer.ranks], len(transfer.ranks)
    if n == 1:
        return Fraction(0)
    if transfer.collective == "all_to_all":
        return Fraction(sum(held * (n - held) for held in Counter(nodes).values()), n * (n - 1))
    return Fraction(sum(here != there for here, there in zip(nodes, nodes[1:] + nodes[:1], strict=True)), n)
