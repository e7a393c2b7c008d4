"""Steps that must not be applied: a loss that is not finite, or one that jumps; and when to go back to a checkpoint.

Everything is decided from numbers that are the same on all ranks, so all leave out the same steps without asking.

A loss L is a spike when L > median + k * 1.4826 * MAD of the last finite losses. MAD, the median distance from the
median, times 1.4826 is the standard deviation of normal noise, and a few wild values do not move it.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from moe_dist.config.schema import GuardConfig
from moe_dist.train.exit_codes import DIVERGED, EndRun

_NORMAL = 1.4826
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves is no reason to take noise for a spike


class SpikeDetector:
    """Over the last `window` losses added; silent below window / 5 of them."""

    def __init__(self, window: int, mads: float) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._mads, self._enough = mads, max(1, window // 5)

    def add(self, loss: float) -> None:
        """Finite losses only: one NaN would be the end of every median after it."""
        assert math.isfinite(loss)
        self._losses.append(loss)

    def limit(self) -> float:
        """The largest loss that is no spike."""
        if len(self._losses) < self._enough:
            return math.inf
        middle = median(self._losses)
        spread = _NORMAL * median(abs(loss - middle) for loss in self._losses)
        return middle + self._mads * max(spread, _LEAST_SPREAD * abs(middle))


class Health:
    """The same state on every rank: what was left out, and whether the run should go back.

    skipped: steps left out since the run began, for the optimizer has made fewer steps than the loop. recent: losses
    of the last steps before this start. checkpoint: whether the run has one to go back to.
    """

    def __init__(
        self, guard: GuardConfig, skipped: int = 0, recent: Iterable[float] = (), checkpoint: bool = False
    ) -> None:
        self.guard, self.skipped, self.in_a_row = guard, skipped, 0
        self.finite = True  # loss and gradients of the last step
        self.trouble: str | None = None  # why the run should go back to its last checkpoint now
        self._spiked = False  # the trouble is a spike
        self._checkpoint = checkpoint
        self.compare_with(recent)
        self._left_out: set[int] = set()  # steps that a run which went back passes over
        self._went_back_at: int | None = None

    def compare_with(self, recent: Iterable[float]) -> None:
        """From now on; the run has gone back to where these were its last losses. What came after them was lower, as a
        rule, and would make spikes of steps that were none at the first pass."""
        self._detector = SpikeDetector(self.guard.spike_window, self.guard.spike_mads)
        for loss in recent:
            self._detector.add(loss)

    def look(self, step: int, loss: float, aux: float) -> tuple[str | None, str | None]:
        """(why this step must not be applied, what is odd about it all the same); None where there is nothing to say.

        step: counted from 1.
        """
        if not math.isfinite(loss + aux):
            return f"loss {loss}, auxiliary loss {aux}", None
        limit = self._detector.limit()
        if self.guard.spike == "off" or loss <= limit:
            return None, None
        spike = f"loss {loss:.4f} is above {limit:.4f}"
        if self.guard.spike == "log":
            return None, spike
        if self.guard.spike == "roll_back" and self._checkpoint:
            if step in self._left_out:
                return f"{spike}, again", None
            self._left_out.add(step)
            self.trouble, self._spiked = f"step {step}: {spike}", True
        return spike, None

    def settle(self, step: int, loss: float, reason: str | None, finite: bool = True) -> None:
        """After the step was applied, or left out for `reason`. finite: its loss and its gradients."""
        self.finite = finite
        if reason is None:
            self.in_a_row = 0
            self._detector.add(loss)
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.guard.max_skipped:
            self.found(f"{self.in_a_row} steps in a row were left out, up to step {step}: {reason}")

    def found(self, trouble: str) -> None:
        """Something, no spike, for which the run should go back."""
        self.trouble, self._spiked = trouble, False

    def evaluated(self, step: int, record: Mapping[str, Any]) -> None:
        """After step `step` was evaluated, with this outcome."""
        for name, value in record.items():
            if "loss" in name and isinstance(value, float) and not math.isfinite(value):
                self.found(f"{name} after step {step} is {value}")

    def saved(self, step: int) -> None:
        """A checkpoint past the trouble: the run may go back once more, if it must."""
        self._checkpoint = True
        if self._went_back_at is not None and step > self._went_back_at:
            self._went_back_at = None

    def no_way_back(self, why: str) -> EndRun:
        return EndRun(DIVERGED, f"{self.trouble}; {why}: lower optim.lr, or clip (engine.grad_clip)")

    def go_back(self, step: int, checkpoint: Path) -> None:
        """Called before `checkpoint` is loaded. Raises EndRun where the run has gone back from here before; not for
        spikes, which go back once a step, for it is left out the next time."""
        if not self._spiked:
            if self._went_back_at is not None:
                raise EndRun(
                    DIVERGED,
                    f"{self.trouble}; at step {self._went_back_at} the run had gone back to a checkpoint already: "
                    "lower optim.lr, clip (engine.grad_clip), look at the data of these steps, or remove "
                    f"{checkpoint} to go back further",
                )
            self._went_back_at = step
        self.trouble, self._spiked, self.in_a_row = None, False, 0
