"""Rules of the engine, the optimizer, the steps, the run and its guard."""

import re
from collections.abc import Iterator

from moe_dist.config.rules.parts import MANY, Uses, above_zero, at_least, at_most, between, unused
from moe_dist.config.schema import EngineConfig, GuardConfig, OptimConfig, RunConfig, TrainConfig

_FP32_MAX = 3.4e38
_TEN_YEARS = 10 * 365 * 24 * 60.0  # minutes
_SCHEDULE_USES: Uses = {
    "min_lr_ratio": ("schedule", "cosine linear wsd"),
    "decay_fraction": ("schedule", "wsd"),
}
_SPIKE_USES: Uses = {
    "spike_window": ("spike", "log skip roll_back"),
    "spike_mads": ("spike", "log skip roll_back"),
}


def engine_rules(engine: EngineConfig) -> Iterator[str]:
    yield from above_zero(engine, "engine", "grad_clip", "null clips nothing")
    yield from at_most(engine, "engine", grad_clip=1e12, bucket_mib=1e6)
    yield from above_zero(engine, "engine", "bucket_mib", "null exchanges everything at once")
    yield from between(engine, "engine", "zero_stage", 0, 3)
    if engine.name == "native":
        if engine.zero_stage > 0:
            yield f"zero_stage={engine.zero_stage} needs engine.name deepspeed; native replicates (engine.zero_stage 0)"
        return
    if engine.zero_stage == 0 and engine.precision == "bf16":
        yield (
            "zero_stage=0 with precision=bf16 is not supported under deepspeed: its stage 0 accumulates gradients in "
            "bf16 and takes a norm per rank; set engine.zero_stage to 1 or engine.name to native"
        )


def optim_rules(optim: OptimConfig, engine: EngineConfig) -> Iterator[str]:
    if optim.implementation != "torch" and engine.name != "native":
        yield (
            f"implementation={optim.implementation} is of engine.name=native, not {engine.name}; "
            "set optim.implementation to torch"
        )
    yield from above_zero(optim, "optim", "lr eps decay_fraction")
    yield from at_most(optim, "optim", lr=_FP32_MAX, eps=1.0, warmup_steps=MANY)
    yield from unused(optim, "optim", _SCHEDULE_USES)
    if optim.lr > 0 and optim.weight_decay * optim.lr > 1:
        yield (
            f"weight_decay={optim.weight_decay} is above 1/lr={1 / optim.lr:g}: a step takes lr*weight_decay of each "
            "weight away, more than all of it; lower optim.weight_decay"
        )
    yield from at_least(0, optim, "optim", "weight_decay warmup_steps")
    yield from between(optim, "optim", "min_lr_ratio", 0, 1)
    if optim.decay_fraction > 1:
        yield f"decay_fraction={optim.decay_fraction} is above 1, but a share of all steps; lower optim.decay_fraction"
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            yield f"{name}={beta} is outside 0 <= {name} < 1; change optim.{name}"


def train_rules(train: TrainConfig) -> Iterator[str]:
    yield from at_least(1, train, "train", "steps seq_len threads")
    yield from at_most(train, "train", steps=MANY, seq_len=2**24, threads=1024)
    yield from at_most(train, "train", global_batch=2**24, micro_batch=2**24, accumulation=2**24)
    yield from between(train, "train", "seed", 0, 2**63 - 1)
    yield from between(train, "train", "data_seed", 0, 2**63 - 1)


def run_rules(run: RunConfig, steps: int) -> Iterator[str]:
    """steps: of training."""
    yield from at_least(
        1, run, "run", "log_every eval_every evaluations eval_sequences save_every keep_last keep_every"
    )
    yield from at_least(0, run, "run", "sample_tokens")
    yield from above_zero(run, "run", "time_limit", "null is no limit")
    yield from at_most(run, "run", log_every=MANY, eval_every=MANY, eval_sequences=MANY, save_every=MANY)
    yield from at_most(run, "run", keep_last=MANY, keep_every=MANY, sample_tokens=2**20, time_limit=_TEN_YEARS)
    if run.keep_every is not None and run.save_every >= 1 and run.keep_every % run.save_every:
        yield (
            f"keep_every={run.keep_every} is not a multiple of save_every={run.save_every}, so its steps have no "
            "checkpoint; change one of them"
        )
    if run.evaluations is not None and run.evaluations > steps >= 1:
        yield (
            f"evaluations={run.evaluations} are more than there are steps: lower run.evaluations to at most "
            f"train.steps={steps}"
        )
    if run.keep_best and run.evaluations is not None:
        yield (
            f"keep_best=true needs a validation loss for each checkpoint, but evaluations={run.evaluations} lie at "
            "fractions of the schedule; set run.evaluations to null and use eval_every, or keep_best to false"
        )
    elif run.keep_best and run.eval_every >= 1 and run.save_every % run.eval_every:
        yield (
            f"keep_best=true needs a validation loss for each checkpoint, but save_every={run.save_every} is not a "
            f"multiple of eval_every={run.eval_every}; change one of them"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", run.name):
        yield (
            f"name={run.name!r} is not a simple file name; "
            "make run.name of letters, digits, '.', '_' and '-', not opening with '.' or '-'"
        )


def guard_rules(guard: GuardConfig, engine: EngineConfig) -> Iterator[str]:
    yield from at_least(1, guard, "guard", "max_skipped spike_window check_replicas")
    yield from at_least(0, guard, "guard", "max_restarts")
    yield from above_zero(guard, "guard", "spike_mads")
    yield from at_most(guard, "guard", max_skipped=MANY, max_restarts=MANY, check_replicas=MANY)
    yield from at_most(guard, "guard", spike_window=1_000_000, spike_mads=1e9)
    yield from unused(guard, "guard", _SPIKE_USES)
    yield from above_zero(guard, "guard", "stall_seconds", "null watches nothing")
    if guard.stall_seconds is not None and guard.stall_seconds > 540:
        yield (
            f"stall_seconds={guard.stall_seconds} is above 540, but collectives give up after 600 and would not say "
            "whose fault it was; lower guard.stall_seconds"
        )
    if guard.check_replicas is not None and engine.name == "deepspeed" and engine.zero_stage == 3:
        yield (
            f"check_replicas={guard.check_replicas} has nothing to compare at zero_stage=3, where each parameter lies "
            "in pieces; set guard.check_replicas to null or lower engine.zero_stage"
        )
