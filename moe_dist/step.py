"""What a forward pass must know beside its activations."""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group


@dataclass(frozen=True)
class Site:
    """Whose experts: those of a block's feed-forward, or those of its attention."""

    layer: int
    kind: Literal["feed_forward", "attention"] = "feed_forward"

    @property
    def number(self) -> int:
        """One for each site of a model, by which it draws: 0, 1, ... of feed-forwards, -1, -2, ... of attention."""
        return self.layer if self.kind == "feed_forward" else -1 - self.layer


class Witness(Protocol):
    """Sees every decision of a step; `moe-dist verify` uses one to compare a layout with a single process."""

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        """The scores to decide by: those given, or a reference's where they are equal within rounding."""

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
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
class DocumentEnds:
    """What happens behind the token that ends a document, `end_id`.

    mask: later tokens do not see it, nor what is before it. reset: the next token is at position 0.
    """

    end_id: int
    mask: bool
    reset: bool


@dataclass(frozen=True)
class StepContext:
    """What a forward pass must know beside its activations. Everything random is a function of `key`.

    phase: `train` applies capacity_factor, `eval` eval_capacity_factor, `dropless` drops nothing; noise is for `train`.
    step: optimizer step, for schedules. seq_len: tokens of a sequence; None: all tokens are one. token_ids_T: ids of
    this rank's tokens, for hash routing. real: which of them are no padding; None: all. parts: ranks whose local losses
    this process computes; one, unless a single process stands for several. frequency_V: the class of each token id by
    how often it is in the training split. marks_XT: by what the drops of this rank's tokens are counted (moe/drops.py).
    Where either is None, these counts are zeros. ends: None: a sequence is one document.
    """

    key: RandomKey
    phase: Literal["train", "eval", "dropless"] = "train"
    witness: Witness | None = None
    step: int = 0
    seq_len: int | None = None
    token_ids_T: Tensor | None = None
    real: RealTokens | None = None
    parts: int = 1
    frequency_V: Tensor | None = None
    marks_XT: Tensor | None = None
    ends: DocumentEnds | None = None
