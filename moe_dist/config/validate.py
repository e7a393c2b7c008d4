"""Every rule that ties fields of the configuration together, or to the number of ranks.

`validate` runs before anything is allocated and reports all broken rules at once, one line each: the values, the rule,
what to change. `batch_shape` solves global_batch = micro_batch * accumulation * dp for whatever is left open.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_dist.config.rules.attention import attention_rules, routed_rules
from moe_dist.config.rules.model import model_rules
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parallel import parallel_rules
from moe_dist.config.rules.parts import at_least
from moe_dist.config.rules.run import engine_rules, guard_rules, optim_rules, run_rules
from moe_dist.config.rules.switch import switch_rules
from moe_dist.config.rules.task import task_rules
from moe_dist.config.schema import Config, TrainConfig


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
        *model_rules(config.model),
        *attention_rules(config.model),
        *routed_rules(config),
        *moe_rules(config),
        *switch_rules(config),
        *parallel_rules(config, world_size),
        *engine_rules(config),
        *optim_rules(config),
        *task_rules(config),
        *run_rules(config),
        *guard_rules(config),
    ]
    tp = config.parallel.tp
    dp = world_size // tp if tp >= 1 and world_size >= 1 and world_size % tp == 0 else None
    if dp is not None:
        problems += _batch_rules(config.train, dp)
    if problems:
        raise ValueError("\n".join(problems))
    assert dp is not None, "a tp that does not divide the world is a problem above"
    return batch_shape(config.train, dp)


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
