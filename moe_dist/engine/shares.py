"""Who saves what, where several ranks hold the same: each an equal share, agreed on without a message.

Ranks that hold the same pieces lay them end to end and cut that into parts whose numbers of elements differ by one at
most. Sizes alone decide, so a single large matrix is shared too, and a file has few ranges. What a rank holds alone is
as large on every rank, but for experts of different widths: so equal shares make equal files, and nobody has to know
what the others hold.
"""

from collections import defaultdict
from collections.abc import Sequence

from moe_dist.parallel.mesh import Group, Mesh
from moe_dist.parallel.sharding import ParamSpec


def shares(held: Sequence[tuple[int, Group]]) -> list[range]:
    """Which elements of each piece are this rank's to save. held: (elements, the ranks that hold the same) of every
    piece, in an order that is the same on those ranks; each element is one rank's."""
    total: dict[Group, int] = defaultdict(int)
    for size, copies in held:
        total[copies] += size
    found, begins = [], dict.fromkeys(total, 0)
    for size, copies in held:
        begin, whole = begins[copies], total[copies]
        first, last = (whole * rank // copies.size - begin for rank in (copies.rank, copies.rank + 1))
        found.append(range(min(max(first, 0), size), min(max(last, 0), size)))
        begins[copies] += size
    return found


def copies(spec: ParamSpec, mesh: Mesh) -> Group:
    """The ranks that hold the same piece of a parameter that no ZeRO stage has cut."""
    return {"replicated": mesh.world, "tensor": mesh.dp, "expert": mesh.edp}[spec.shard]
