"""Which checkpoints of a run stay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """keep_last: the newest ones. keep_every: besides, those of every nth step, for good; step 0, left by a run that
    was stopped before its first step, is none of them. keep_best: besides, the one with the lowest validation loss, the
    earliest of equals; those without a finite loss take no part."""

    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of the steps in `losses`, each with its validation loss if known, those that stay."""
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in steps if step and step % self.keep_every == 0}
        known = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
        if self.keep_best and known:
            kept.add(min(known)[1])
        return kept
