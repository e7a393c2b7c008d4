"""What an error for want of memory should have said: how much is needed for what, and which settings lower it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.config import BatchShape, Config
from moe_dist.engine.base import compute_dtype
from moe_dist.parallel.mesh import Layout
from moe_dist.parallel.sharding import logical_parameters


@dataclass(frozen=True, kw_only=True)
class Held:
    """Elements of the parameters on a rank, before ZeRO cuts them: over dp, those of experts over edp."""

    dense: int
    expert: int = 0

    @staticmethod
    def by(model: nn.Module) -> "Held":
        """What this rank holds of a model, which may be on the meta device."""
        count = {True: 0, False: 0}
        for _, param, spec in logical_parameters(model):
            count[spec.shard == "expert"] += getattr(param, "ds_numel", param.numel())  # whole ones, under ZeRO-3
        return Held(dense=count[False], expert=count[True])

    def bytes(self, each: int, layout: Layout, cut: bool) -> int:
        """each: of an element. cut: whether ZeRO cuts them."""
        return each * (self.dense // (layout.dp if cut else 1) + self.expert // (layout.edp if cut else 1))


@contextmanager
def explained(config: Config, shape: BatchShape, layout: Layout, held: Held) -> Iterator[None]:
    """Raises RuntimeError with advice in place of an error for want of memory; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RuntimeError(f"out of memory: {advice(config, shape, layout, held)}") from error


def advice(config: Config, shape: BatchShape, layout: Layout, held: Held) -> str:
    """Bytes for what a rank holds, by what they are for, and what to change, the cheapest first."""
    engine, dp = config.engine, layout.dp
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    low = engine.precision == "bf16"
    weights = held.bytes(compute_dtype(engine.precision).itemsize, layout, cut=stage >= 3)
    gradients = held.bytes(4, layout, cut=stage >= 2)
    masters = low or stage >= 1  # ZeRO keeps them beside fp32 weights too
    optimizer = held.bytes(12 if masters else 8, layout, cut=stage >= 1)
    lines = [
        f"{held.dense + held.expert} parameters on this rank take about {_size(weights)} of weights, "
        f"{_size(gradients)} of gradients and {_size(optimizer)} of optimizer state, beside the activations of "
        f"{shape.micro_batch} x {shape.seq_len} tokens in {config.model.num_layers} blocks"
    ]
    if shape.micro_batch > 1:
        lines.append(f"lower train.micro_batch (it is {shape.micro_batch}; gradients accumulate over the rest)")
    elif shape.seq_len > 1:
        lines.append(f"train.micro_batch is 1 already; lower train.seq_len (it is {shape.seq_len})")
    if config.model.recompute != "block":
        lines.append(f"set model.recompute to block (it is {config.model.recompute})")
    if dp > 1 and stage < 3:
        lines.append(f"raise engine.zero_stage (it is {stage}, over {dp} ranks; engine.name must be deepspeed)")
    experts, ep, etp = config.model.moe.num_experts, config.parallel.ep, config.parallel.etp
    if any(experts % more == 0 and layout.world % (more * etp) == 0 for more in range(ep + 1, experts + 1)):
        lines.append(f"raise parallel.ep (it is {ep}, for {experts} experts on {layout.world} ranks)")
    if not low:
        lines.append("set engine.precision to bf16 (activations take half)")
    return "; ".join(lines)


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    known = ("DefaultCPUAllocator: can't allocate", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in known)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
