"""Keys and values of the tokens seen so far, in memory that is allocated once.

Legend: B batch, G key/value heads, S tokens of a call, L tokens in the cache, P width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Rows fill on their own: `lengths` says how many tokens each holds. What was written is not differentiable; the
    keys and values of the call at hand are.

    The first update after a reset decides how many rows are in use. Raises ValueError when a row would overflow, when
    shapes do not fit, and when a position would leave a gap.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        n_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = dict(max_batch_size=max_batch_size, max_seq_len=max_seq_len, n_heads=n_heads, head_dim=head_dim)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is below 1")
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        shape = (max_batch_size, n_heads, max_seq_len, head_dim)
        self.k_BGLP, self.v_BGLP = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths: list[int] = []

    @property
    def cache_position(self) -> int:
        """Tokens in the longest row: where the next token goes when all rows are equally long."""
        return max(self.lengths, default=0)

    def starts(self) -> Tensor | None:
        """Position of the next token of each row, [B] int64 on the cache's device; None where all are the same."""
        if len(set(self.lengths)) < 2:
            return None
        return torch.tensor(self.lengths, device=self.k_BGLP.device)

    def update(self, k_BGSP: Tensor, v_BGSP: Tensor, cache_position: int | None = None) -> tuple[Tensor, Tensor]:
        """Append S tokens to every row -> all keys and values [B, G, longest, P], in the precision of those given.

        cache_position: continue there, forgetting what comes later; None continues after each row's last token. Of rows
        that are not the longest, what lies past their length has no meaning: mask it.
        """
        rows, heads, length, width = k_BGSP.shape
        _, own_heads, _, own_width = self.k_BGLP.shape
        if k_BGSP.shape != v_BGSP.shape or (heads, width) != (own_heads, own_width):
            raise ValueError(
                f"keys {tuple(k_BGSP.shape)} and values {tuple(v_BGSP.shape)} do not fit a cache of {own_heads} heads "
                f"of width {own_width}: give [batch, heads, tokens, width]"
            )
        starts = self.check_room(rows, length, cache_position)
        self._write(k_BGSP, v_BGSP, starts)
        self.lengths = [start + length for start in starts]
        if torch.is_grad_enabled():  # the next update writes to the memory that these would be views of
            return self._joined(self.k_BGLP, k_BGSP, starts), self._joined(self.v_BGLP, v_BGSP, starts)
        k_BGLP, v_BGLP = self.get()
        return k_BGLP.to(k_BGSP.dtype), v_BGLP.to(v_BGSP.dtype)

    def check_room(self, rows: int, length: int, cache_position: int | None = None) -> list[int]:
        """Where `length` more tokens of each of `rows` rows would go. Raises ValueError where they cannot."""
        if rows > self.max_batch_size:
            raise ValueError(f"a batch of {rows} is above max_batch_size={self.max_batch_size} of the cache")
        if cache_position == 0 or not self.lengths:
            filled, starts = 0, [0] * rows
        elif rows != len(self.lengths):
            raise ValueError(f"a batch of {rows}, but the cache holds {len(self.lengths)} rows: reset it first")
        else:
            filled, starts = min(self.lengths), list(self.lengths)
        if cache_position is not None:
            if not 0 <= cache_position <= filled:
                raise ValueError(f"cache_position={cache_position} is outside the {filled} tokens in the cache")
            starts = [cache_position] * rows
        if max(starts, default=0) + length > self.max_seq_len:
            raise ValueError(
                f"{max(starts)} tokens in the cache and {length} more are above max_seq_len={self.max_seq_len}: make "
                "the cache longer, or reset it"
            )
        return starts

    def get(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows in use, [B, G, longest, P]: views, which the next update writes to."""
        rows, longest = len(self.lengths), self.cache_position
        return self.k_BGLP[:rows, :, :longest], self.v_BGLP[:rows, :, :longest]

    def rewind(self, position: int) -> None:
        """Continue every row at `position`, forgetting what comes later. At 0, other rows may follow."""
        starts = self.check_room(len(self.lengths), 0, position)
        self.lengths = starts if position else []

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of each row: after a prefill of padded prompts, their true lengths."""
        pairs = zip(lengths, self.lengths, strict=False)
        if len(lengths) != len(self.lengths) or any(not 0 <= new <= old for new, old in pairs):
            raise ValueError(f"lengths {list(lengths)} are not within the lengths in the cache, {self.lengths}")
        longest = self.cache_position
        self.lengths = list(lengths)
        for row, length in enumerate(lengths):  # a weight of 0 does not hide what is not finite
            self.k_BGLP[row, :, length:longest] = 0
            self.v_BGLP[row, :, length:longest] = 0

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        rows, longest = len(self.lengths), self.cache_position
        self.k_BGLP[:rows, :, :longest] = 0
        self.v_BGLP[:rows, :, :longest] = 0
        self.lengths = []

    def to(self, *args: Any, **kwargs: Any) -> "KVCache":
        """Move in place, with the arguments of Tensor.to; what is in the cache stays."""
        self.k_BGLP, self.v_BGLP = (t.to(*args, **kwargs) for t in (self.k_BGLP, self.v_BGLP))
        return self

    @torch.no_grad()
    def _write(self, k_BGSP: Tensor, v_BGSP: Tensor, starts: list[int]) -> None:
        rows, length = len(starts), k_BGSP.shape[2]
        for kept, new in ((self.k_BGLP, k_BGSP), (self.v_BGLP, v_BGSP)):
            if len(set(starts)) == 1:
                kept[:rows, :, starts[0] : starts[0] + length] = new.to(kept.dtype)
            else:
                for row, start in enumerate(starts):
                    kept[row, :, start : start + length] = new[row].to(kept.dtype)

    def _joined(self, kept: Tensor, new: Tensor, starts: list[int]) -> Tensor:
        """What was there before, and the new ones with their gradient."""
        longest, length = max(starts), new.shape[2]
        if len(set(starts)) == 1:
            return torch.cat((kept[: len(starts), :, :longest].to(new.dtype), new), dim=2)
        total = longest + length
        out = kept[: len(starts), :, :total].to(new.dtype, copy=True)
        for row, start in enumerate(starts):
            ends = (out[row, :, :start], new[row], out[row, :, start + length :])
            out = out.index_copy(0, torch.tensor([row], device=out.device), torch.cat(ends, dim=1)[None])
        return out
