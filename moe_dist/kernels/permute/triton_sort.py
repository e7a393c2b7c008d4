"""Sorting assignments by expert: a stable counting sort.

Three passes, no atomics: each block of assignments counts its experts; one running sum over (expert, block) gives the
place where a block's first row of an expert goes; then each assignment adds how many before it, in its own block, chose
the same expert.

Legend: X rows of x (tokens, or rows that arrived from other ranks), K assignments of each, N = X * K, R rows kept,
sorted by expert, E experts, B assignments of a block (or blocks: counts_EB), S part of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.kernels.launch import check_launch
from moe_dist.kernels.permute.order import RowOrder

BLOCK = 256  # assignments of a block; each is compared with all others of it
STEP = 16  # of them at a time
_TILE = 4096  # comparisons held at once while counting


def sort_rows(experts_XK: Tensor, kept_XK: Tensor | None, num_experts: int, rows: int | None = None) -> RowOrder:
    """RowOrder.of."""
    check_launch("sort_rows", _histogram, experts_XK)
    experts_XK, kept_XK = experts_XK.contiguous(), None if kept_XK is None else kept_XK.contiguous()
    counts_EB, ends_EB = _count(experts_XK, kept_XK, num_experts)
    counts_e = counts_EB.sum(1)
    if kept_XK is None:
        length, rows = experts_XK.numel(), None
    else:
        length = int(counts_e.sum()) if rows is None else rows
    # Zeros past the kept rows, which nobody fills: they are read as indices.
    slots_R = (torch.empty if rows is None else torch.zeros)(length, dtype=torch.int64, device=experts_XK.device)
    rows_XK = torch.empty_like(experts_XK, dtype=torch.int64)
    _place[(counts_EB.shape[1],)](
        *(experts_XK, kept_XK, ends_EB, slots_R, rows_XK, experts_XK.numel(), counts_EB.shape[1]),
        BLOCK=BLOCK,
        STEP=STEP,
    )
    if kept_XK is None:
        kept_XK = torch.ones_like(experts_XK, dtype=torch.bool)
    return RowOrder(counts_e, slots_R, rows_XK, kept_XK, rows)


def histogram_step(num_experts: int) -> tuple[int, int]:
    """(experts padded, assignments counted at a time)."""
    padded = triton.next_power_of_2(num_experts)
    return padded, min(max(_TILE // padded, 1), BLOCK)


def _count(experts: Tensor, kept: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Assignments of each expert in each block, [E, B], and their running sum over all of [E, B] in that order."""
    blocks = max(triton.cdiv(experts.numel(), BLOCK), 1)
    counts_EB = torch.empty(num_experts, blocks, dtype=torch.int32, device=experts.device)
    padded, step = histogram_step(num_experts)
    _histogram[(blocks,)](
        *(experts, kept, counts_EB, experts.numel(), blocks), E=num_experts, E_PAD=padded, BLOCK=BLOCK, STEP=step
    )
    return counts_EB, counts_EB.flatten().cumsum(0)


@triton.jit
def _experts_at(experts_ptr: tl.tensor, kept_ptr: tl.tensor, n_B: tl.tensor, total: tl.tensor) -> Any:
    """Expert of each assignment; -1 where it is dropped or past the end."""
    expert_B = tl.load(experts_ptr + n_B, mask=n_B < total, other=-1).to(tl.int32)
    if kept_ptr is not None:
        expert_B = tl.where(tl.load(kept_ptr + n_B, mask=n_B < total, other=False), expert_B, -1)
    return expert_B


@triton.jit
def _histogram(
    experts_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    total: tl.tensor,
    blocks: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    expert_E = tl.arange(0, E_PAD)
    counts_E = tl.zeros([E_PAD], tl.int32)
    for start in range(0, BLOCK, STEP):
        n_S = block * BLOCK + start + tl.arange(0, STEP)
        expert_S = _experts_at(experts_ptr, kept_ptr, n_S, total)
        counts_E += tl.sum((expert_S[:, None] == expert_E[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + expert_E.to(tl.int64) * blocks + block, counts_E, mask=expert_E < E)


@triton.jit
def _end_before(ends_ptr: tl.tensor, expert_B: tl.tensor, block: tl.tensor, blocks: tl.tensor) -> Any:
    """Rows in front of the first one that `block` gives to each expert: the running sum just before (expert, block)."""
    cell_B = expert_B.to(tl.int64) * blocks + block
    return tl.load(ends_ptr + cell_B - 1, mask=cell_B > 0, other=0)


@triton.jit
def _rank(
    experts_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    total: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> Any:
    """(assignment, expert, how many before it in this block have the same expert)."""
    place_B = tl.arange(0, BLOCK)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    expert_B = _experts_at(experts_ptr, kept_ptr, begin + place_B, total)
    rank_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, STEP):
        place_S = start + tl.arange(0, STEP)
        expert_S = _experts_at(experts_ptr, kept_ptr, begin + place_S, total)
        before_BS = (expert_S[None, :] == expert_B[:, None]) & (place_S[None, :] < place_B[:, None])
        rank_B += tl.sum(before_BS.to(tl.int32), 1)
    return begin + place_B, expert_B, rank_B


@triton.jit
def _place(
    experts_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    total: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    n_B, expert_B, rank_B = _rank(experts_ptr, kept_ptr, total, BLOCK, STEP)
    row_B = _end_before(ends_ptr, expert_B, tl.program_id(0), blocks) + rank_B
    tl.store(slots_ptr + row_B, n_B, mask=expert_B >= 0)
    tl.store(rows_ptr + n_B, tl.where(expert_B >= 0, row_B, 0), mask=n_B < total)
