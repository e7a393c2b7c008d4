"""Messages whose sizes follow from the capacity alone: nobody asks the host how many rows there are.

Under a limit of C rows an expert takes no more than C, and no more than the T tokens that its sender has. So every
rank sends every expert a block of B = min(C, T) rows, filled from the front; what arrives is sorted by counts that stay
on the device. Rows past the counts hold anything and are never looked at. Experts that share a pool share a block: its
rows are those of one expert after another.

    C = 2: a is for expert 0, b and c for expert 1      blocks [a, .] [b, c]      in a pool of two, C = 2: [a, b, c, .]

Under local scope a block is as long as the fullest wants it. Under global scope all ranks share the limit, so that a
block is up to ep times what a rank sends on average: that is what sizes known beforehand cost there.

Legend: T tokens on this rank, K assignments of a token, E experts, e experts held here, w ranks of the ep group, P
pools of experts (or those held here), n experts of a pool, B rows of a block, X rows that arrive.
"""

import torch
from torch import Tensor

from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.moe.choice import DispatchPlan


def block_rows(plan: DispatchPlan) -> int:
    """B: the most rows that this rank can send one pool."""
    assert plan.pool_rows is not None, "without a limit there is no size to know beforehand"
    tokens, top_k = plan.experts_TK.shape
    return max(min(plan.pool_rows, tokens * min(top_k, plan.pool)), 1)


def most_rows(plan: DispatchPlan, ranks: int) -> int:
    """That a pool can get from `ranks` of the world: of all ranks together, or of each of those that send."""
    assert plan.pool_rows is not None
    return max(min(plan.pool_rows if plan.shared else plan.pool_rows * ranks, block_rows(plan) * ranks), 1)


def departure(plan: DispatchPlan, permute: Permutation, place_P: Tensor | None = None) -> RowOrder:
    """Kept assignments in the blocks of the pools they go to, [P * B] rows. place_P: where each pool's block stands
    among those that leave, a permutation; None: in the order of pools."""
    num_experts, block = plan.kept_WE.shape[1], block_rows(plan)
    pools = num_experts // plan.pool
    rows = min(plan.experts_TK.numel(), pools * block)
    dense = permute.sort_rows(plan.experts_TK, plan.kept_TK, num_experts, rows)
    counts_P = dense.counts_e.view(pools, plan.pool).sum(1)
    starts_P, pool_TK = counts_P.cumsum(0) - counts_P, plan.experts_TK // plan.pool
    # From the place among sorted rows to the place among blocks, and back.
    place_TK = pool_TK if place_P is None else place_P[pool_TK]
    rows_TK = torch.where(plan.kept_TK, dense.rows_XK - starts_P[pool_TK] + place_TK * block, 0)
    within_B = torch.arange(block, device=counts_P.device)
    sorted_PB = torch.where(within_B < counts_P[:, None], starts_P[:, None] + within_B, 0)
    if place_P is not None:
        sorted_PB = sorted_PB[place_P.argsort()]
    return RowOrder(dense.counts_e, dense.slots_R[sorted_PB.flatten()], rows_TK, plan.kept_TK, fullest=block)


def arrival(sent_we: Tensor, pool: int, block: int, fullest: int, permute: Permutation) -> RowOrder:
    """The order of X = w * P * B rows, which lie as (source rank, pool here, place in the block), of which sent_we hold
    something. fullest: the most rows that a pool here can get from all ranks."""
    ranks, local = sent_we.shape
    pools = local // pool
    # A block's rows up to the first end are the first expert's: with counts [1, 2], places 0 1 2 3 are of 0 1 1 none.
    ends_wPn = sent_we.view(ranks, pools, pool).cumsum(2)
    place_wPB = torch.arange(block, device=sent_we.device).expand(ranks, pools, block).contiguous()
    within_wPB = torch.searchsorted(ends_wPn, place_wPB, right=True)
    expert_wPB = within_wPB + pool * torch.arange(pools, device=sent_we.device)[:, None]
    kept_X1 = (within_wPB < pool).view(-1, 1)
    order = permute.sort_rows(expert_wPB.view(-1, 1), kept_X1, local, min(kept_X1.numel(), pools * fullest))
    return order.up_to(fullest)
