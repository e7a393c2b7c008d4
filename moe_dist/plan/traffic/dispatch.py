"""What one trip of rows to their experts and back exchanges, in each form of dispatch.

| dispatch     | to the experts, and gradients of results | back, and gradients of rows               |
|--------------|------------------------------------------|-------------------------------------------|
| local        |                                          |                                           |
| all_to_all   | all-to-all of ep                         | the same                                  |
| hierarchical | all-to-all of ep_node, then ep_across    | ep_across, then ep_node                   |
| all_gather   | all-gather of ep                         | reduce-scatter; in low precision all-to-all |

A leg is one exchange on the way: `there` rows are handed in on the way out, `back` rows on the way home. Backward goes
both ways again, results' gradients out and rows' gradients home, all in the format of the way home (wire.py).

Legend: w ranks of the ep group, e experts of each, A its nodes, I its ranks on each. sent_wwe[i, j, k]: rows that rank
i sends to expert k of rank j.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.moe.dispatch.wire import Wire, row_bytes
from moe_dist.parallel.mesh import Axis, Layout


class Leg(NamedTuple):
    """Rows of this rank, its own part included. calls: exchanges that they travel in, each way."""

    axis: Axis
    there: int
    back: int
    calls: int = 1


@dataclass(frozen=True)
class Widths:
    """Numbers of a row on its way to the experts and of a result, of type `dtype`."""

    row: int
    result: int
    dtype: torch.dtype


def sent_rows(kept_WE: Tensor, layout: Layout, rank: int) -> Tensor:
    """sent_wwe: what the counts of all ranks say of this rank's ep group; etp cuts each expert into narrower ones."""
    ranks = layout.ranks("ep", rank)
    kept_wE = kept_WE[ranks[0] : ranks[-1] + 1].repeat_interleave(layout.etp, dim=1)
    return kept_wE.reshape(len(ranks), len(ranks), -1)


def legs(moe: MoEConfig, sent_wwe: Tensor, layout: Layout, rank: int, block: int | None, pool: int) -> list[Leg]:
    """Of the dispatchers that exchange rows. block: rows that a padded wire has for every `pool` experts, where they
    are known without the counts; None: the fullest expert says."""
    me = rank - layout.ranks("ep", rank)[0]
    send, received = int(sent_wwe[me].sum()), int(sent_wwe[:, me].sum())
    if moe.dispatch == "hierarchical":
        places = layout.ep_local
        sent_AIAI = sent_wwe.sum(2).view(-1, places, len(sent_wwe) // places, places)
        halfway = int(sent_AIAI[me // places, :, :, me % places].sum())
        return [Leg("ep_node", send, halfway), Leg("ep_across", halfway, received)]
    parts = moe.overlap_chunks
    if moe.wire == "ragged":
        return [Leg("ep", send, received, parts)]
    each = sent_wwe.shape[2] // parts
    if block is None:
        blocks = [max(int(part_wwe.max()), 1) for part_wwe in sent_wwe.split(each, dim=2)]
        rows = len(sent_wwe) * each * sum(blocks)
    else:
        rows = len(sent_wwe) * sent_wwe.shape[2] // pool * block
    return [Leg("ep", rows, rows, parts)]


class Trip(NamedTuple):
    """One exchange: bytes by when they travel."""

    axis: Axis
    what: str
    calls: int
    forward: int
    backward: int


def trips(found: list[Leg], moe: MoEConfig, widths: Widths) -> list[Trip]:
    """What the legs carry: rows to experts, results home, and the gradients of both."""
    wire, dtype = Wire.of(moe.wire_dtype), widths.dtype
    out, result_home = row_bytes(widths.row, dtype, wire.out), row_bytes(widths.result, dtype, wire.rest)
    row_home = row_bytes(widths.row, dtype, wire.rest)
    for_all = []
    for leg in found:
        # Gradients of rows travel home as rows travelled out, those of results out as results travelled home.
        for_all.append(Trip(leg.axis, "rows to experts", leg.calls, leg.there * out, leg.there * result_home))
        for_all.append(Trip(leg.axis, "rows from experts", leg.calls, leg.back * result_home, leg.back * row_home))
    return for_all
