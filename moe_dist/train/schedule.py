"""The learning rate, and when to evaluate, as pure functions of the step: a resumed run needs no scheduler state."""

import math

from moe_dist.config.schema import OptimConfig, RunConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) in a run of `steps`.

    With w = max(1, warmup_steps) and r = min_lr_ratio:

        step <  w:  lr * (step + 1) / w                    lr / w at step 0, the peak at step w - 1
        step >= w:  lr * (1 - (1 - r) * decay)             lr * r at the last step, except when constant

        constant    decay = 0
        linear      decay = t                              t = (step + 1 - w) / (steps - w)
        cosine      decay = (1 - cos(pi * t)) / 2
        wsd         decay = max(0, 1 - (steps - 1 - step) / d)
                    d = min(round(decay_fraction * steps), steps - w); no decay if d = 0

    A run of at most w steps ends inside its warm-up. Raises ValueError for a step outside the run.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step={step} must be in 0..{steps - 1}, as train.steps={steps}: raise train.steps to go on")
    warmup = max(1, optim.warmup_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * (1 - (1 - optim.min_lr_ratio) * _decay(step, steps, warmup, optim))


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """After which of `steps` steps the run evaluates, at most as often: at equal fractions of the schedule, after step
    ceil(j * steps / evaluations) for j = 1, 2, ... evaluations."""
    return [-(-number * steps // evaluations) for number in range(1, evaluations + 1)]


def evaluates_after(step: int, steps: int, run: RunConfig) -> bool:
    """Whether the run evaluates after step `step`, counted from 1."""
    if step == steps:
        return True
    if run.evaluations is None:
        return step % run.eval_every == 0
    return step * run.evaluations // steps > (step - 1) * run.evaluations // steps


def schedule_notes(steps: int, optim: OptimConfig) -> list[str]:
    """What a person should know of the learning rate."""
    if optim.warmup_steps <= steps:
        return []
    reached = learning_rate(steps - 1, steps, optim)
    return [
        f"the run ends inside its warm-up, after steps={steps} of warmup_steps={optim.warmup_steps}: "
        f"the learning rate reaches {reached:.1e} of lr={optim.lr:.1e}"
    ]


def _decay(step: int, steps: int, warmup: int, optim: OptimConfig) -> float:
    """How much of the way from the peak to the final learning rate is behind us, 0 to 1."""
    t = (step + 1 - warmup) / (steps - warmup)
    if optim.schedule == "constant":
        return 0.0
    if optim.schedule == "linear":
        return t
    if optim.schedule == "cosine":
        return (1 - math.cos(math.pi * t)) / 2
    if optim.schedule == "wsd":
        decay_steps = min(round(optim.decay_fraction * steps), steps - warmup)
        return max(0.0, 1 - (steps - 1 - step) / decay_steps) if decay_steps else 0.0
    raise ValueError(f"optim.schedule={optim.schedule!r} must be constant, cosine, linear or wsd")
