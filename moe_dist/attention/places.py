"""Where the tokens of a call are, and which of them may be seen.

Legend: B batch, S sequence, H query heads, P width of a head.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """rotary: (cos, sin), each [1 or B, S, P / 2]. slopes_H: ALiBi. keys_BS: bool, keys that may be seen at all."""

    rotary: tuple[Tensor, Tensor] | None = None
    slopes_H: Tensor | None = None
    keys_BS: Tensor | None = None
    causal: bool = True
