"""Where the tokens of a forward pass are: made once by the model, read by the attention of every block."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """rotary: (cos, sin), each [1 or B, S, half of the numbers of a head that are turned], or None. slopes_H: ALiBi
    slopes of all query heads. bias: added to the scores, [1 or B, 1 or H, S, keys]; -inf hides a key."""

    rotary: tuple[Tensor, Tensor] | None = None
    slopes_H: Tensor | None = None
    bias: Tensor | None = None
