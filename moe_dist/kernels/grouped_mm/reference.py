"""One matrix product per expert, over rows sorted by expert: [R, K] x [e, K, N] -> [R, N].

Three ways of the same operation: `loop` is the oracle, `bmm` pads every expert to the largest and uses one batched
product, `grouped_mm` is torch's grouped GEMM. Experts without rows get zero gradients, never none.

Legend: R rows, e experts, K in, N out, C rows of the fullest expert.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def loop(rows_RK: Tensor, weight_eKN: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Expert after expert. `unbind`, because indexing would make a full-size zero gradient for every expert."""
    parts = zip(rows_RK.split(list(rows_per_expert)), weight_eKN.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in parts])


def bmm(rows_RK: Tensor, weight_eKN: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Pad to [e, C, K], multiply once, take the rows out again."""
    experts, fullest = len(rows_per_expert), max(rows_per_expert)
    counts_e = torch.tensor(rows_per_expert, device=rows_RK.device)
    starts_e = counts_e.cumsum(0) - counts_e
    shift_e = torch.arange(experts, device=rows_RK.device) * fullest - starts_e
    slots_R = torch.arange(rows_RK.shape[0], device=rows_RK.device) + shift_e.repeat_interleave(counts_e)
    padded = rows_RK.new_zeros(experts * fullest, rows_RK.shape[1]).index_copy(0, slots_R, rows_RK)
    out = torch.bmm(padded.view(experts, fullest, -1), weight_eKN)
    return out.flatten(0, 1).index_select(0, slots_R)


def grouped_mm(rows_RK: Tensor, weight_eKN: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """torch.nn.functional.grouped_mm: offsets int32, contiguous rows; fp32, bf16 and fp16 only."""
    offsets_e = torch.tensor(rows_per_expert, device=rows_RK.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(rows_RK, weight_eKN, offs=offsets_e)


GROUPED_MM = {"loop": loop, "bmm": bmm, "grouped_mm": grouped_mm}
