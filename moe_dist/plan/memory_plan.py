"""Bytes of one rank at the peak of an optimizer step, by what they are for."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank at the peak of an optimizer step, by part; no part is counted in another.

    parameters: weights that are computed with, and fp32 masters where they lie apart. gradients: accumulated ones, and
    those of a backward pass where they lie apart. optimizer: both moments, and the padding of ZeRO's partitions.
    activations: what autograd keeps from the forward to the backward pass of one micro-step, without what the next
    three count. dispatch: rows on their way to experts and back, as far as they are kept. logits: what the loss keeps
    and holds of them at once. workspace: what lives for a moment at the peak: flat buffers of gradients that are
    exchanged, weights that ZeRO-3 gathers, the largest intermediate of a backward pass. margin: what a rank needs
    besides when routing is skewed; 0 where capacity bounds its rows.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    dispatch: int
    logits: int
    workspace: int
    margin: int

    @property
    def total(self) -> int:
        """Of all parts, the margin too."""
        return sum(astuple(self))

    @property
    def expected(self) -> int:
        """Without the margin: when every expert is sent an even share."""
        return self.total - self.margin

    @property
    def sure(self) -> int:
        """What a rank cannot do without, counted exactly: the rest is an estimate."""
        return self.parameters + self.gradients + self.optimizer
