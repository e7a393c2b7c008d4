"""Solves global_batch = micro_batch * accumulation * dp for what the configuration leaves open.

global_batch 24 on dp = 4 ranks:    nothing given      micro_batch 6, accumulation 1
                                    accumulation 3     micro_batch 2
                                    micro_batch 3      accumulation 2
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_dist.config.rules.parts import at_least, refuse
from moe_dist.config.schema import TrainConfig


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
    refuse(batch_rules(train, dp))
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


def batch_rules(train: TrainConfig, dp: int) -> Iterator[str]:
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
