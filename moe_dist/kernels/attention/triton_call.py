"""What the host tells the attention kernels: block sizes, and a Pattern as arguments.

Legend: B batch, H query heads, G key/value heads, Q queries, K keys, P width of a head, N packed sequences; for packed
sequences B is 1 and Q and K count the tokens of all.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moe_dist.kernels.attention.pattern import PackedSequences, Pattern

_PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True)
class Tile:
    """Rows (queries times heads of a group) and keys of one step, warps and pipeline stages."""

    rows: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        return dict(M=self.rows, N=self.keys, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class AttentionTiling:
    """One tile for each kernel: output, gradient of q, gradients of k and v."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile


_HALF_NARROW = AttentionTiling(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))
_HALF_MIDDLE = AttentionTiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2))
_HALF_WIDE = AttentionTiling(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2))
# Whatever else the pattern asks for needs registers, and a bias shared memory too.
_RICH_NARROW = AttentionTiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2))
_RICH_MIDDLE = AttentionTiling(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 128, 8, 2))
_RICH_WIDE = AttentionTiling(Tile(128, 16, 8, 2), Tile(128, 16, 8, 2), Tile(64, 32, 8, 2))
_FULL_NARROW = AttentionTiling(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
_FULL_MIDDLE = AttentionTiling(Tile(32, 32, 8, 2), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
_FULL_WIDE = AttentionTiling(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))


def choose_attention_tiling(dtype: torch.dtype, width: int, rows: int, pattern: Pattern) -> AttentionTiling:
    """For an H100 or H200 (tests/unit/kernels/test_attention_compiles.py: what spills and what does not).

    Taken from what wgmma and its pipelines like, not from timings. rows: how many there are; few of them get few.
    """
    extras = (pattern.window, pattern.keys_BS, pattern.slopes_H, pattern.bias, pattern.dropout)
    if dtype == torch.float32:  # exact fp32 has no tensor cores
        tilings = (_FULL_NARROW, _FULL_MIDDLE, _FULL_WIDE)
    elif any(extra is not None for extra in extras):
        tilings = (_RICH_NARROW, _RICH_MIDDLE, _RICH_WIDE)
    else:
        tilings = (_HALF_NARROW, _HALF_MIDDLE, _HALF_WIDE)
    tiling = tilings[0 if width <= 64 else 1 if width <= 128 else 2]
    few = max(16, triton.next_power_of_2(rows))
    if few >= 64:
        return tiling
    return AttentionTiling(*(Tile(min(few, t.rows), min(64, t.keys), 4, t.num_stages) for t in vars(tiling).values()))


def choose_splits(programs: int, steps: int, least: int) -> int:
    """Into how many parts to cut a loop of `steps` so that `programs` of them keep a GPU busy; `least` steps for each.

    From shapes alone, so that the same call adds up in the same order on every machine.
    """
    return max(1, min(_PROGRAMS // max(programs, 1), steps // least, 32))


@dataclass(frozen=True)
class Call:
    """One attention call; its bias and sinks stand beside it, because they may have gradients."""

    pattern: Pattern
    scale: float
    tiling: AttentionTiling
    packed: PackedSequences | None = None

    def pairs(self, k_BGKP: Tensor) -> int:
        """Sequences times key/value heads."""
        batch = len(k_BGKP) if self.packed is None else len(self.packed.cu_q) - 1
        return batch * k_BGKP.shape[1]

    def rows(self, q_BHQP: Tensor, k_BGKP: Tensor) -> int:
        """Of the longest sequence."""
        queries = q_BHQP.shape[2] if self.packed is None else self.packed.max_q
        return queries * (q_BHQP.shape[1] // k_BGKP.shape[1])

    def keys(self, k_BGKP: Tensor) -> int:
        """Of the longest sequence."""
        return k_BGKP.shape[2] if self.packed is None else self.packed.max_k

    def arguments(
        self, q_BHQP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, bias: Tensor | None, *others: Tensor
    ) -> dict[str, Any]:
        """Those that every kernel takes, by name. others: what it reads and writes beside them, of the same shapes."""
        (batch, heads, queries, width), (groups, keys) = q_BHQP.shape, k_BGKP.shape[1:3]
        pattern, device = self.pattern, q_BHQP.device
        found: dict[str, Any] = dict(q_ptr=q_BHQP, k_ptr=k_BGKP, v_ptr=v_BGKP)
        found |= strides("q", "bhq", q_BHQP) | strides("k", "bgk", k_BGKP) | strides("v", "bgk", v_BGKP)
        found |= dict(cu_q_ptr=None, cu_k_ptr=None, starts_ptr=None, seen_ptr=None, slopes_ptr=None)
        if self.packed is not None:
            found |= dict(cu_q_ptr=self.packed.cu_q, cu_k_ptr=self.packed.cu_k)
        if pattern.starts_B is not None:
            found["starts_ptr"] = pattern.starts_B.to(device).expand(batch).contiguous()
        if pattern.keys_BS is not None:
            found["seen_ptr"] = pattern.keys_BS.to(device).expand(batch, keys).contiguous()
        if pattern.slopes_H is not None:
            found["slopes_ptr"] = pattern.slopes_H.to(device).expand(heads).contiguous()
        bias = None if bias is None else bias.expand(batch, heads, queries, keys)
        found |= strides("bias", "bhqk", bias) | dict(bias_ptr=bias)
        found |= dict(queries=queries, keys=keys, groups=groups, scale=self.scale, window=pattern.window)
        found |= dict(seed=None, threshold=None, first_pair=None, pairs=None)
        dropout = pattern.dropout
        if dropout is not None and dropout.rate > 0:
            pairs = dropout.heads or heads
            found |= dict(seed=dropout.key.value, threshold=math.ceil(dropout.rate * 2.0**53))
            found |= dict(first_pair=dropout.first_row * pairs + dropout.first_head, pairs=pairs)
        padded = max(16, triton.next_power_of_2(width))
        # From the begin of a tile to its end.
        spans = [heads // groups * t.stride(1) + 128 * t.stride(2) for t in (q_BHQP, k_BGKP, v_BGKP, *others)]
        found |= dict(CAUSAL=pattern.causal, R=heads // groups, WIDTH=width, P=padded, PRECISION="ieee")
        return found | dict(WIDE=max(spans) >= 2**31)


def strides(name: str, dims: str, tensor: Tensor | None) -> dict[str, int | None]:
    """name_b, name_h, ... for the first dims; None where there is no tensor."""
    sizes = (None,) * len(dims) if tensor is None else tensor.stride()
    return {f"{name}_{dim}": size for dim, size in zip(dims, sizes, strict=False)}
