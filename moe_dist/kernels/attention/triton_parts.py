"""What the attention kernels are made of: who computes what, which keys a tile sees, scores, the draw of dropout.

The query heads of one key/value head are rows of one tile, row = query * R + head within the group: keys and values are
read once for all of them. Positions are those of Pattern: query i is at start + i, key j at j.

Legend: M rows of a tile, N keys of a tile, P width of a head, in kernels the next power of two; R query heads of a
key/value head. Scores are in base 2: log2(e) is part of the scale, so that exp2 makes weights of them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Arguments that change from call to call: a kernel is not compiled again for each kind of value.
SIZES = ("tiles", "splits", "queries", "keys", "window", "seed", "threshold", "first_pair", "pairs")


@triton.jit
def place(tiles, groups):
    """(row of the batch, key/value head, tile) of this program; tiles of one head are neighbours and share its keys."""
    program = tl.program_id(0)
    pair = program // tiles
    return (pair // groups).to(tl.int64), (pair % groups).to(tl.int64), program % tiles


@triton.jit
def sequence(cu_q_ptr, cu_k_ptr, starts_ptr, batch, queries, keys):
    """(row in memory, first query, queries, first key, keys, position of the first query) of one row of the batch.

    Sequences that are packed one after the other are all in row 0.
    """
    row, first_q, first_k = batch, batch * 0, batch * 0
    if cu_q_ptr is not None:
        row = batch * 0
        first_q = tl.load(cu_q_ptr + batch).to(tl.int64)
        first_k = tl.load(cu_k_ptr + batch).to(tl.int64)
        queries = (tl.load(cu_q_ptr + batch + 1) - first_q).to(tl.int32)
        keys = (tl.load(cu_k_ptr + batch + 1) - first_k).to(tl.int32)
    start = keys - queries
    if starts_ptr is not None:
        start = tl.load(starts_ptr + batch).to(tl.int32)
    return row, first_q, queries, first_k, keys, start


@triton.jit
def rows_of(first, queries, R: tl.constexpr, M: tl.constexpr):
    """(which rows are real, query, head within the group) of M rows. Rows past the end repeat the last one."""
    row_M = first + tl.arange(0, M)
    inside_M = tl.minimum(row_M, queries * R - 1)
    return row_M < queries * R, inside_M // R, inside_M % R


@triton.jit
def base(ptr, row, head, token, stride_row, stride_head, stride_token):
    """Where a tile begins; row, head and token are int64."""
    return ptr + row * stride_row + head * stride_head + token * stride_token


@triton.jit
def offsets(head_M, token_M, stride_head, stride_token, WIDE: tl.constexpr):
    """From there on, of rows. In 32 bits, which saves registers, unless WIDE: they are not enough."""
    if WIDE:
        head_M, token_M = head_M.to(tl.int64), token_M.to(tl.int64)
    return head_M * stride_head + token_M * stride_token


@triton.jit
def key_offsets(N: tl.constexpr, stride, WIDE: tl.constexpr):
    """The same of the keys of a tile."""
    line_N = tl.arange(0, N)
    if WIDE:
        line_N = line_N.to(tl.int64)
    return line_N * stride


@triton.jit
def load_rows(ptr, offset_M, inside_M, WIDTH: tl.constexpr, P: tl.constexpr):
    """[M, P]; zeros past the width and, unless inside_M is None, for rows that are not inside."""
    col_P = tl.arange(0, P)
    at_MP = ptr + offset_M[:, None] + col_P[None, :]
    if inside_M is None and WIDTH == P:
        x_MP = tl.load(at_MP)
    elif inside_M is None:
        x_MP = tl.load(at_MP, mask=(col_P < WIDTH)[None, :], other=0.0)
    elif WIDTH == P:
        x_MP = tl.load(at_MP, mask=inside_M[:, None], other=0.0)
    else:
        x_MP = tl.load(at_MP, mask=inside_M[:, None] & (col_P < WIDTH)[None, :], other=0.0)
    return x_MP


@triton.jit
def store_rows(ptr, offset_M, x_MP, inside_M, WIDTH: tl.constexpr, P: tl.constexpr):
    col_P = tl.arange(0, P)
    mask_MP = inside_M[:, None] & (col_P < WIDTH)[None, :]
    tl.store(ptr + offset_M[:, None] + col_P[None, :], x_MP, mask=mask_MP)


@triton.jit
def key_bounds(first, last, keys, window, CAUSAL: tl.constexpr, N: tl.constexpr):
    """(a, b, c, d) for queries at positions first..last: they see keys in [a, d) only, and all of those in [b, c).

    All but d are multiples of N.
    """
    a, b, c, d = 0, 0, keys // N * N, keys
    if CAUSAL:
        c = tl.minimum(keys, tl.maximum(first + 1, 0)) // N * N
        d = tl.minimum(keys, tl.maximum(last + 1, 0))
    if window is not None:
        if not CAUSAL:
            c = tl.minimum(keys, tl.maximum(first + window, 0)) // N * N
            d = tl.minimum(keys, tl.maximum(last + window, 0))
        a = tl.minimum(tl.maximum(first - window + 1, 0), d) // N * N
        b = (tl.minimum(tl.maximum(last - window + 1, 0), d) + N - 1) // N * N
        c = tl.maximum(b, c)
    return a, b, c, d


@triton.jit
def row_bounds(first, last, start, queries, window, CAUSAL: tl.constexpr, R: tl.constexpr, M: tl.constexpr):
    """(a, b, c, d) for keys first..last: rows in [a, d) see one of them at least, those in [b, c) all.

    All but d, and c where it is d, are multiples of M.
    """
    a, b, d = 0, 0, queries * R
    c = d
    if CAUSAL:
        a = tl.minimum(tl.maximum(first - start, 0), queries) * R // M * M
        b = (tl.minimum(tl.maximum(last - start, 0), queries) * R + M - 1) // M * M
    if window is not None:
        if not CAUSAL:
            a = tl.minimum(tl.maximum(first - window + 1 - start, 0), queries) * R // M * M
            b = (tl.minimum(tl.maximum(last - window + 1 - start, 0), queries) * R + M - 1) // M * M
        d = tl.minimum(tl.maximum(last + window - start, 0), queries) * R
        c = tl.minimum(tl.maximum(first + window - start, 0), queries) * R // M * M
    b = tl.minimum(b, d)
    c = tl.maximum(b, c)
    return a, b, c, d


@triton.jit
def share(bounds, split, splits, STEP: tl.constexpr):
    """The bounds of one of `splits` equal parts, in whole steps."""
    a, b, c, d = bounds
    steps = (d - a + STEP - 1) // STEP
    steps = (steps + splits - 1) // splits
    low = tl.minimum(a + split * steps * STEP, d)
    high = tl.minimum(low + steps * STEP, d)
    return low, clamp(b, low, high), clamp(c, low, high), high


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def scores(
    products, scale, position, key, keys, slope, bias_rows, bias_k, seen_ptr, window,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 of products q . k; -inf where the key is hidden.

    position, slope, bias_rows (pointers) belong to rows, key to columns, or the other way round: of shapes [M, 1] and
    [1, N], or [1, M] and [N, 1]. Only where not MASKED every key is known to be inside and near enough.
    """
    out = products * (scale * LOG2E)
    far = position - key
    if slope is not None:
        out -= slope * LOG2E * tl.abs(far).to(tl.float32)
    if bias_rows is not None:
        out += tl.load(bias_rows + key.to(tl.int64) * bias_k, mask=key < keys, other=0.0).to(tl.float32) * LOG2E
    if seen_ptr is not None:
        out = tl.where(tl.load(seen_ptr + key, mask=key < keys, other=0) != 0, out, float("-inf"))
    if MASKED:
        near = key < keys
        if CAUSAL:
            near = near & (far >= 0)
        if window is not None:
            near = near & (far < window)
            if not CAUSAL:
                near = near & (far > -window)
        out = tl.where(near, out, float("-inf"))
    return out


@triton.jit
def kept(pair, position, key, seed, threshold):
    """Which weights dropout keeps: Dropout.kept, bit for bit. pair: number of the row and head; all of them int64.

    threshold: the rate in units of 2^-53, rounded up.
    """
    bits = ((pair << 42) + (position.to(tl.int64) << 21) + key) ^ seed
    bits = _mix(_mix(bits.to(tl.uint64, bitcast=True)) + 0x9E3779B97F4A7C15)
    return (bits >> 11).to(tl.int64) >= threshold


@triton.jit
def growth(threshold):
    """1 / (1 - rate)."""
    return 1.0 / (1.0 - threshold.to(tl.float32) * 1.1102230246251565e-16)


@triton.jit
def _mix(z):
    """The finaliser of SplitMix64, as in kernels/random.py."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
