"""What the grouped kernels are made of: the order of their programs, the main loop, activations and derivatives.

Legend: M rows of a tile, N columns, K depth of one step; sizes of blocks in capitals. Row numbers are int64 from the
table of tiles on, so that row * width has room past 2^31.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from moe_dist.kernels.tile import add_product

GROUP = 8  # tiles that share a column block of weights while it is in L2


@triton.jit
def place(tiles, columns, GROUP: tl.constexpr):
    """(tile, column block) of this program: all columns for GROUP tiles, tile after tile inside a column block.

    Tiles of one expert are neighbours, so programs that run together read the same weights and few rows.
    """
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    inside = program % (GROUP * columns)
    size = tl.minimum(tiles - first, GROUP)
    return first + inside % size, inside // size


@triton.jit
def add_products(
    acc_MN, acc2_MN, a_ptr, a_rows_M, b_ptr, b2_ptr, b_cols_N, b_stride_n, b_stride_k, columns, depth,
    INSIDE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += a[rows] @ b and, loading `a` once, acc2 += a[rows] @ b2 unless b2 is None.

    a: [.., depth]; b, b2: [depth, columns] by their strides. Rows of `a` must be valid numbers, and with INSIDE columns
    of `b` too: they are loaded without a mask. EVEN: depth is a multiple of K.
    """
    offsets_K = tl.arange(0, K)
    a_MK_ptr = a_ptr + a_rows_M[:, None] * depth + offsets_K[None, :]
    shift_KN = offsets_K[:, None].to(tl.int64) * b_stride_k + b_cols_N[None, :] * b_stride_n
    column_1N = (b_cols_N < columns)[None, :]
    for k in range(0, depth, K):
        depth_K = offsets_K < depth - k
        a_MK = tl.load(a_MK_ptr) if EVEN else tl.load(a_MK_ptr, mask=depth_K[None, :], other=0.0)
        mask_KN = column_1N if EVEN else depth_K[:, None] & column_1N
        b_KN = tl.load(b_ptr + shift_KN) if EVEN and INSIDE else tl.load(b_ptr + shift_KN, mask=mask_KN, other=0.0)
        acc_MN = add_product(acc_MN, a_MK, b_KN, PRECISION)
        if b2_ptr is not None:
            if EVEN and INSIDE:
                b2_KN = tl.load(b2_ptr + shift_KN)
            else:
                b2_KN = tl.load(b2_ptr + shift_KN, mask=mask_KN, other=0.0)
            acc2_MN = add_product(acc2_MN, a_MK, b2_KN, PRECISION)
        a_MK_ptr += K
        shift_KN += K * b_stride_k
    return acc_MN, acc2_MN


@triton.jit
def halves(acc_MN):
    """Left and right columns. An epilogue done one half after the other needs the registers of one half."""
    M: tl.constexpr = acc_MN.shape[0]
    N: tl.constexpr = acc_MN.shape[1]
    return acc_MN.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def value_and_slope(x, FUNCTION: tl.constexpr):
    """f(x) and f'(x) in fp32. gelu is the exact one, by erf; gelu_tanh is x sigmoid(2 z), as (1 + tanh z) / 2 is
    sigmoid(2 z); relu2 is relu squared; clamped is x sigmoid(1.702 x) of x up to 7."""
    if FUNCTION == "silu":
        gate = 1 / (1 + tl.exp(-x))
        value = x * gate
        slope = gate + value * (1 - gate)
    elif FUNCTION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FUNCTION == "gelu_tanh":
        gate = 1 / (1 + tl.exp(-1.5957691216057308 * x * (1 + 0.044715 * x * x)))
        value = x * gate
        slope = gate + value * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif FUNCTION == "relu":
        value = tl.where(x <= 0, 0.0, x)  # not a maximum: that would turn NaN into 0
        slope = tl.where(x > 0, 1.0, 0.0)
    elif FUNCTION == "relu2":
        slope = 2 * tl.where(x <= 0, 0.0, x)
        value = 0.25 * slope * slope
    else:
        tl.static_assert(FUNCTION == "clamped")
        clamped = tl.where(x > 7.0, 7.0, x)
        gate = 1 / (1 + tl.exp(-1.702 * clamped))
        value = clamped * gate
        slope = tl.where(x > 7.0, 0.0, gate + 1.702 * value * (1 - gate))
    return value, slope


@triton.jit
def factor_of(up, FUNCTION: tl.constexpr):
    """What f(gate) is multiplied by: up, or with clamped 1 + up within -7 and 7."""
    if FUNCTION == "clamped":
        up = 1 + tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
    return up


@triton.jit
def through_factor(grad, up, FUNCTION: tl.constexpr):
    """The gradient of up, from that of `factor_of`."""
    if FUNCTION == "clamped":
        grad = tl.where(tl.abs(up) > 7.0, 0.0, grad)
    return grad
