"""Every rule that ties fields of the configuration together, or to the number of ranks.

`validate` runs before anything is allocated and reports all broken rules at once, one line each: the values, the rule,
what to change. `batch_shape` solves global_batch = micro_batch * accumulation * dp for whatever is left open.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe_dist.config.attention_rules import attention_rules, routed_rules
from moe_dist.config.model import ModelConfig
from moe_dist.config.moe_rules import moe_rules
from moe_dist.config.rules import above_zero, at_least, between, multiple
from moe_dist.config.schema import Config, TrainConfig
from moe_dist.config.switch_rules import switch_rules
from moe_dist.config.task_rules import task_rules


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """One optimizer step: `accumulation` forward passes of `micro_batch` sequences on each of `dp` ranks."""

    micro_batch: int
    accumulation: int
    dp: int
    global_batch: int
    seq_len: int

    @property
    def micro_step_sequences(self) -> int:
        """Sequences of one forward pass over all ranks. Their tokens compete for capacity."""
        return self.micro_batch * self.dp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch * self.seq_len


def batch_shape(train: TrainConfig, dp: int) -> BatchShape:
    """Derives what the configuration leaves null. Raises ValueError if nothing whole fits."""
    problems = list(_batch_rules(train, dp))
    if problems:
        raise ValueError("\n".join(problems))
    if train.micro_batch is not None:
        micro_batch = train.micro_batch
        accumulation = train.global_batch // (micro_batch * dp)
    else:
        accumulation = train.accumulation or 1
        micro_batch = train.global_batch // (accumulation * dp)
    return BatchShape(
        micro_batch=micro_batch,
        accumulation=accumulation,
        dp=dp,
        global_batch=train.global_batch,
        seq_len=train.seq_len,
    )


def validate(config: Config, world_size: int) -> BatchShape:
    """Checks a configuration against `world_size` ranks. Raises one ValueError with a line for every broken rule."""
    problems = [
        *_model_rules(config.model),
        *attention_rules(config.model),
        *routed_rules(config),
        *moe_rules(config),
        *switch_rules(config),
        *_tensor_parallel_rules(config, world_size),
        *_engine_rules(config),
        *_optim_rules(config),
        *task_rules(config),
        *_run_rules(config),
        *_guard_rules(config),
    ]
    tp = config.parallel.tp
    dp = world_size // tp if tp >= 1 and world_size >= 1 and world_size % tp == 0 else None
    if dp is not None:
        problems += _batch_rules(config.train, dp)
    if problems:
        raise ValueError("\n".join(problems))
    assert dp is not None, "a tp that does not divide the world is a problem above"
    return batch_shape(config.train, dp)


def _model_rules(model: ModelConfig) -> Iterator[str]:
    yield from at_least(1, model, "model", "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff")
    yield from above_zero(model, "model", "rope_theta norm_eps")
    yield from multiple(
        "num_heads",
        model.num_heads,
        "num_kv_heads",
        model.num_kv_heads,
        "every key/value head serves the same number of query heads; change model.num_kv_heads (1 is always right)",
    )
    turns = model.attention.position == "rotary"
    if model.head_dim is not None:
        if turns and model.head_dim % 2:
            yield f"head_dim={model.head_dim} is odd; rotary embedding turns pairs of numbers: make model.head_dim even"
        return
    d_model, num_heads = model.d_model, model.num_heads
    yield from multiple("d_model", d_model, "num_heads", num_heads, "change one of them, or set model.head_dim")
    if turns and num_heads >= 1 and d_model % num_heads == 0 and d_model // num_heads % 2:
        yield (
            f"head_dim=d_model/num_heads={d_model}/{num_heads}={d_model // num_heads} is odd; "
            "rotary embedding turns pairs of numbers: change model.num_heads or set an even model.head_dim"
        )


def _tensor_parallel_rules(config: Config, world_size: int) -> Iterator[str]:
    model, moe, tp, ep = config.model, config.model.moe, config.parallel.tp, config.parallel.ep
    yield from at_least(1, config.parallel, "parallel", "ep tp etp node_size")
    if world_size < 1:
        yield f"world size {world_size} is below 1; start at least one rank"
    else:
        both = config.parallel.etp > 1
        for name, size in (("tp", tp), ("ep*etp", config.parallel.expert_ranks) if both else ("ep", ep)):
            if size >= 1 and world_size % size:
                yield f"{name}={size} does not divide world size {world_size}; change parallel.{name} or the ranks"
    node, ranks = config.parallel.node_size, config.parallel.expert_ranks
    across = node is not None and world_size > node >= 1 and ranks >= 1
    if moe.dispatch == "hierarchical" and across and node and ranks % node and node % ranks:
        yield (
            f"dispatch=hierarchical needs ep groups that lie evenly on nodes, but neither of ep*etp={ranks} and "
            f"node_size={node} divides the other; change parallel.node_size, or set dispatch to all_to_all"
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield "sequence_parallel=true needs tp > 1; set parallel.sequence_parallel to false or raise parallel.tp"
    split = {
        "num_heads": (model.num_heads, "model.num_heads"),
        "vocab_size": (model.vocab_size, "model.vocab_size"),
        "seq_len": (config.train.seq_len, "train.seq_len"),
    }
    if moe.num_experts == 0 or moe.every > 1:
        split["d_ff"] = (model.d_ff, "model.d_ff")
    if moe.num_experts > 0 and moe.num_shared_experts > 0:
        width = max(moe.d_ff) if isinstance(moe.d_ff, list) else moe.d_ff or model.d_ff
        split["num_shared_experts*d_ff"] = (moe.num_shared_experts * width, "the width of the shared experts")
    for name, (size, key) in split.items():
        yield from multiple(name, size, "tp", tp, f"each tensor-parallel rank takes an equal part; change {key}")


def _engine_rules(config: Config) -> Iterator[str]:
    engine = config.engine
    yield from above_zero(engine, "engine", "grad_clip", "null clips nothing")
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


def _optim_rules(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.train.steps
    yield from above_zero(optim, "optim", "lr eps decay_fraction")
    yield from at_least(0, optim, "optim", "weight_decay warmup_steps")
    yield from between(optim, "optim", "min_lr_ratio", 0, 1)
    if optim.decay_fraction > 1:
        yield f"decay_fraction={optim.decay_fraction} is above 1, but a share of all steps; lower optim.decay_fraction"
    if optim.warmup_steps > steps >= 1:
        yield f"warmup_steps={optim.warmup_steps} is larger than steps={steps}; lower optim.warmup_steps"
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            yield f"{name}={beta} is outside 0 <= {name} < 1; change optim.{name}"


def _run_rules(config: Config) -> Iterator[str]:
    run, train = config.run, config.train
    yield from at_least(1, train, "train", "steps seq_len threads")
    yield from between(train, "train", "seed", 0, 2**63 - 1)
    yield from at_least(1, run, "run", "log_every eval_every eval_sequences save_every keep_last keep_every")
    yield from at_least(0, run, "run", "sample_tokens")
    yield from above_zero(run, "run", "time_limit", "null is no limit")
    if run.keep_every is not None and run.save_every >= 1 and run.keep_every % run.save_every:
        yield (
            f"keep_every={run.keep_every} is not a multiple of save_every={run.save_every}, so its steps have no "
            "checkpoint; change one of them"
        )
    if run.keep_best and run.eval_every >= 1 and run.save_every % run.eval_every:
        yield (
            f"keep_best=true needs a validation loss for each checkpoint, but save_every={run.save_every} is not a "
            f"multiple of eval_every={run.eval_every}; change one of them"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", run.name):
        yield (
            f"name={run.name!r} is not a simple file name; "
            "make run.name of letters, digits, '.', '_' and '-', not opening with '.' or '-'"
        )


def _guard_rules(config: Config) -> Iterator[str]:
    guard = config.guard
    yield from at_least(1, guard, "guard", "max_skipped spike_window check_replicas")
    yield from at_least(0, guard, "guard", "max_restarts")
    yield from above_zero(guard, "guard", "spike_mads")
    yield from above_zero(guard, "guard", "stall_seconds", "null watches nothing")
    if guard.stall_seconds is not None and guard.stall_seconds > 540:
        yield (
            f"stall_seconds={guard.stall_seconds} is above 540, but collectives give up after 600 and would not say "
            "whose fault it was; lower guard.stall_seconds"
        )
    if guard.check_replicas is not None and config.engine.name == "deepspeed" and config.engine.zero_stage == 3:
        yield (
            f"check_replicas={guard.check_replicas} has nothing to compare at zero_stage=3, where each parameter lies "
            "in pieces; set guard.check_replicas to null or lower engine.zero_stage"
        )


def _batch_rules(train: TrainConfig, dp: int) -> Iterator[str]:
    if dp < 1:
        yield f"dp={dp} is below 1; start at least one data-parallel rank"
        return
    too_small = list(at_least(1, train, "train", "global_batch micro_batch accumulation"))
    if too_small:
        yield from too_small
        return
    total, micro_batch, accumulation = train.global_batch, train.micro_batch, train.accumulation
    if micro_batch is not None and accumulation is not None:
        product = micro_batch * accumulation * dp
        if total != product:
            yield (
                f"global_batch={total} is not micro_batch*accumulation*dp={micro_batch}*{accumulation}*{dp}={product}; "
                "leave train.micro_batch or train.accumulation null"
            )
        return
    name, factor = ("micro_batch", micro_batch) if micro_batch is not None else ("accumulation", accumulation or 1)
    if total % (factor * dp):
        yield (
            f"global_batch={total} is not divisible by {name}*dp={factor}*{dp}={factor * dp}; "
            f"change train.global_batch, train.{name} or the number of ranks"
        )
