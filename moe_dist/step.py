"""What a forward pass must know beside its activations."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group


class Witness(Protocol):
    """Sees every decision of a step; `moe-dist verify` uses one to compare a layout with a single process."""

    def scores(self, layer: int, what: str, scores: Tensor) -> Tensor:
        """The scores to decide by: those given, or a reference's where they are equal within rounding."""

    def decided(self, layer: int, experts_TK: Tensor, kept_TK: Tensor) -> None:
        """What was decided for this rank's tokens."""


@dataclass(frozen=True)
class RealTokens:
    """Which tokens are no padding. Padding goes to no expert, takes no capacity and counts in no loss nor load.

    mask_T: bool, of this rank's tokens. total: true ones over all of `token_ranks`.
    """

    mask_T: Tensor
    total: int

    @staticmethod
    def of(mask_T: Tensor, token_ranks: Group) -> "RealTokens":
        """Every rank must call, with its own tokens."""
        return RealTokens(mask_T, int(all_reduce(mask_T.sum(), token_ranks)))


@dataclass(frozen=True)
class StepContext:
    """What a forward pass must know beside its activations. Everything random is a function of `key`.

    phase: `train` applies capacity_factor, `eval` eval_capacity_factor, `dropless` drops nothing; noise is for `train`.
    step: optimizer step, for schedules. seq_len: tokens of a sequence; None: all tokens are one. token_ids_T: ids of
    this rank's tokens, for hash routing. real: which of them are no padding; None: all. parts: ranks whose local losses
    this process computes; one, unless a single process stands for several.
    """

    key: RandomKey
    phase: Literal["train", "eval", "dropless"] = "train"
    witness: Witness | None = None
    step: int = 0
    seq_len: int | None = None
    token_ids_T: Tensor | None = None
    real: RealTokens | None = None
    parts: int = 1
