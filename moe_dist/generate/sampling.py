"""Which token comes next: temperature, top-k and top-p, with a number given from outside.

Legend: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the most likely token; where it is hardly above, the draw chooses among equally likely ones.
    top_k: choose among so many of the most likely. top_p: among the fewest whose probabilities add up to it
    (nucleus sampling, arXiv 1904.09751). None: among all."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and not negative: 0 takes the most likely")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is below 1: choose among at least one token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside 0 < top_p <= 1")

    def choose(self, logits_BV: Tensor, draw_B: Tensor) -> Tensor:
        """[B] int64; -1 where the scores of a row are not finite. draw_B: a number in [0, 1) for each row."""
        logits_BV = logits_BV.double()
        best_B1 = logits_BV.amax(-1, keepdim=True)
        broken_B = ~best_B1[:, 0].isfinite()
        if self.temperature == 0:
            return logits_BV.argmax(-1).masked_fill(broken_B, -1)
        # Less the best first: divided by 1e-308, the best itself would be infinite.
        probs_BV = ((logits_BV - best_B1) / self.temperature).softmax(-1)
        if self.top_k is not None or self.top_p is not None:
            probs_BV = self._best(probs_BV)
        total_BV = probs_BV.cumsum(-1)
        # The first place whose sum exceeds the draw: never a token of probability 0.
        chosen_B1 = torch.searchsorted(total_BV, draw_B[:, None] * total_BV[:, -1:], right=True)
        return chosen_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1).masked_fill(broken_B, -1)

    def _best(self, probs_BV: Tensor) -> Tensor:
        """Zero for all but the best by both rules; top_p counts what top_k has left, as one."""
        ranked = probs_BV.sort(dim=-1, descending=True, stable=True)
        kept_BV = ranked.values
        if self.top_k is not None:
            kept_BV = kept_BV[:, : self.top_k]
        if self.top_p is not None:
            before_BV = kept_BV.cumsum(-1) - kept_BV
            beyond_BV = (before_BV >= self.top_p * kept_BV.sum(-1, keepdim=True)) & (before_BV > 0)  # never the best
            kept_BV = kept_BV.masked_fill(beyond_BV, 0.0)
        return torch.zeros_like(probs_BV).scatter(1, ranked.indices[:, : kept_BV.shape[1]], kept_BV)
