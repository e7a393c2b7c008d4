"""How the rows of each expert are cut into tiles, and how large the blocks of each kernel are.

Legend: R rows sorted by expert, e experts, M tiles (a bound that the host knows), D d_model, F expert hidden.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProductBlock:
    """One kernel's columns of the result, depth of a step of the product, warps and pipeline stages.

    halves: whether the epilogue, where it has one, takes the columns in two halves, to need fewer registers.
    """

    n: int
    k: int
    num_warps: int = 8
    num_stages: int = 3
    halves: bool = False


@dataclass(frozen=True)
class ExpertTiling:
    """rows: of a tile, in every kernel whose result has R rows. grad_rows: hidden units of a weight gradient's tile.

    precision: how fp32 is multiplied, "ieee", "tf32" or "tf32x3"; other dtypes do not ask.
    """

    rows: int
    grad_rows: int
    up: ProductBlock  # two products, [rows, n] each
    down: ProductBlock
    hidden_grad: ProductBlock
    input_grad: ProductBlock  # two products into one sum
    up_grad: ProductBlock  # two products, [grad_rows, n] each
    out_grad: ProductBlock
    precision: str = "ieee"


_HALF = ExpertTiling(
    rows=128,
    grad_rows=128,
    up=ProductBlock(128, 64, 8, 4, halves=True),
    down=ProductBlock(256, 64, 8, 3),
    hidden_grad=ProductBlock(128, 64, 8, 4, halves=True),
    input_grad=ProductBlock(256, 64, 8, 3),
    up_grad=ProductBlock(64, 64, 4, 3),
    out_grad=ProductBlock(256, 64, 8, 3),
)
# Few rows for each expert: most of a tile of 128 would be empty.
_HALF_SHORT = replace(
    _HALF,
    rows=64,
    up=ProductBlock(128, 64, 4, 3, halves=True),
    down=ProductBlock(128, 64, 4, 4),
    hidden_grad=ProductBlock(128, 64, 4, 4, halves=True),
    input_grad=ProductBlock(128, 64, 4, 4),
)
# Widths that are no multiple of 16: rows begin anywhere, so numbers are loaded one by one, each with its own address.
_HALF_ODD = ExpertTiling(
    rows=64,
    grad_rows=64,
    up=ProductBlock(64, 32, 8, 3),
    down=ProductBlock(64, 32, 8, 3),
    hidden_grad=ProductBlock(64, 32, 8, 3),
    input_grad=ProductBlock(64, 32, 8, 3),
    up_grad=ProductBlock(64, 32, 8, 3),
    out_grad=ProductBlock(64, 32, 8, 3),
)
# Exact fp32 has no tensor cores: smaller blocks, and registers for the operands.
_FULL = ExpertTiling(
    rows=64,
    grad_rows=64,
    up=ProductBlock(64, 16, 8, 3),
    down=ProductBlock(64, 16, 8, 3),
    hidden_grad=ProductBlock(64, 16, 8, 3),
    input_grad=ProductBlock(64, 16, 8, 3),
    up_grad=ProductBlock(64, 16, 8, 3),
    out_grad=ProductBlock(64, 16, 8, 3),
)


def choose_expert_tiling(dtype: torch.dtype, rows: int, experts: int, d_model: int, d_ff: int) -> ExpertTiling:
    """Sizes for an H100 or H200; no kernel spills there (tests/unit/kernels/test_grouped_mm_compiles.py).

    Those of _HALF are the best of what benchmarks/gpu_tune.py tried on an H200, kernel by kernel; the others follow the
    shapes that wgmma and its pipelines like, untimed. Blocks shrink to small matrices.
    """
    if dtype == torch.float32:
        tiling = _FULL
    elif d_model % 16 or d_ff % 16:
        tiling = _HALF_ODD
    else:
        tiling = _HALF_SHORT if rows <= 64 * experts else _HALF

    def fit(block: ProductBlock, columns: int, depth: int | None) -> ProductBlock:
        k = block.k if depth is None else min(block.k, _power_of_2(depth))
        return replace(block, n=min(block.n, _power_of_2(columns)), k=k)

    return replace(
        tiling,
        grad_rows=min(tiling.grad_rows, _power_of_2(d_ff)),
        up=fit(tiling.up, d_ff, d_model),
        down=fit(tiling.down, d_model, d_ff),
        hidden_grad=fit(tiling.hidden_grad, d_ff, d_model),
        input_grad=fit(tiling.input_grad, d_model, d_ff),
        up_grad=fit(tiling.up_grad, d_model, None),
        out_grad=fit(tiling.out_grad, d_model, None),
    )


def _power_of_2(size: int) -> int:
    """The next one, but no less than the 16 that a product of blocks needs."""
    return max(16, 1 << (size - 1).bit_length())


def tile_table(counts_e: Tensor, rows: int, block: int) -> Tensor:
    """Expert, first row and end of its expert's rows for each tile, [3, M] int64, made on the device.

    M = rows // block + e is enough for any counts that sum to `rows` or less, so nobody waits to learn how many tiles
    there are. A tile too many begins at or past the end of its expert, which tells its programs to leave.
    """
    experts = counts_e.numel()
    blocks_e = counts_e.add(block - 1).div(block, rounding_mode="floor")
    block_ends_e, ends_e = blocks_e.cumsum(0), counts_e.cumsum(0)
    tiles_M = torch.arange(rows // block + experts, device=counts_e.device)
    expert_M = torch.searchsorted(block_ends_e, tiles_M, right=True).clamp_(max=experts - 1)
    first_e = ends_e - counts_e - (block_ends_e - blocks_e) * block
    return torch.stack([expert_M, first_e[expert_M] + tiles_M * block, ends_e[expert_M]])
