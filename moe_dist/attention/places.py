"""Where the tokens of a batch are, and what of each other they may see: the same for every layer of a model.

Legend: B batch, S sequence, P width of a head, H query heads.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Places:
    """rotary: tables (cos, sin) of the queries' positions, [S, P / 2] or [1 or B, S, P / 2]; None without rotary.
    slopes_H: ALiBi slopes of all heads. keys_BS: bool, keys that may be seen."""

    rotary: tuple[Tensor, Tensor] | None
    slopes_H: Tensor | None
    keys_BS: Tensor | None
    causal: bool = True
