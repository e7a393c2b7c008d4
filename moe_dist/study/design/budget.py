"""Equal budgets: how many steps a point trains, so that it spends what the base with the overrides spends.

| equal  | what is equal                                                                                         |
|--------|-------------------------------------------------------------------------------------------------------|
| tokens | steps * global_batch * seq_len                                                                        |
| flops  | planned FLOPs (planned.py): nominal ones, less the expert rows that a capacity factor below 1 has no  |
|        | place for. What is executed is less again by what imbalance drops, which the ledger measures          |
| time   | seconds of training steps on the machine of the probe (probe.py), from planned FLOPs of a step        |

Steps are whole, so a budget is met within half a step; a point that misses it by more than 2% is refused. The warm-up
keeps its share of the steps, unless an axis sets it. What else counts steps stays as the base has it: run.save_every,
run.eval_every, capacity_schedule.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from moe_dist.config import Config
from moe_dist.config.rules.parts import MANY
from moe_dist.study.design.planned import planned_flops, planned_tokens

Equal = Literal["tokens", "flops", "time"]

LARGEST_RESIDUAL = 0.02
"""Share of a budget that a point may miss."""


@dataclass(frozen=True, slots=True)
class Budget:
    """spends: of a configuration, in the unit of `amount`; grows with train.steps."""

    equal: Equal
    amount: float
    spends: Callable[[Config], float]

    def fit(self, config: Config, scale_warmup: bool = True) -> Config:
        """With the steps that come nearest to the budget, and the warm-up scaled with them.

        Raises ValueError when even they miss it by more than LARGEST_RESIDUAL.
        """
        steps = self._steps(config)
        fitted = min(
            (_with_steps(config, count) for count in (steps - 1, steps) if count > 0),
            key=lambda each: abs(self.residual(each)),
        )
        missed = self.residual(fitted)
        if abs(missed) > LARGEST_RESIDUAL:
            raise ValueError(
                f"equal={self.equal} asks for {self.amount:.4g}, but steps={fitted.train.steps} miss that by "
                f"{missed:+.1%}, more than {LARGEST_RESIDUAL:.0%}; give the base more steps, or points smaller ones"
            )
        return _warmed(fitted, fitted.train.steps / config.train.steps) if scale_warmup else fitted

    def _steps(self, config: Config) -> int:
        """The first that spend as much. Without a schedule of capacities they are proportional to it, and found at
        once."""

        def spent(count: int) -> float:
            return self.spends(_with_steps(config, count))

        guess = max(2, round(self.amount / spent(config.train.steps) * config.train.steps))
        low, high = guess - 1, guess + 1
        if not spent(low) < self.amount <= spent(high):
            low, high = 1, MANY
        return bisect_left(range(MANY), self.amount, low, high, key=spent)

    def residual(self, config: Config) -> float:
        """By which share of the budget it is missed; positive: more is spent."""
        return self.spends(config) / self.amount - 1


def make_budget(
    equal: Equal, base: Config, ranks: int, step_seconds: Callable[[Config], float] | None = None
) -> Budget:
    """base: a valid configuration. step_seconds: of a step of a configuration, for `time`."""
    if equal == "time":
        assert step_seconds is not None

        def spends(config: Config) -> float:
            return config.train.steps * step_seconds(config)

    elif equal == "tokens":
        spends = planned_tokens
    else:

        def spends(config: Config) -> float:
            return planned_flops(config, ranks)

    return Budget(equal, spends(base), spends)


def _with_steps(config: Config, steps: int) -> Config:
    return replace(config, train=replace(config.train, steps=steps))


def _warmed(config: Config, times: float) -> Config:
    before = config.optim.warmup_steps
    after = max(1, round(before * times)) if before else 0
    return replace(config, optim=replace(config.optim, warmup_steps=after))
