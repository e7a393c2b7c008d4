"""What an error for want of memory should have said: how much is needed for what, and which settings lower it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_dist.config import BatchShape, Config
from moe_dist.engine.base import compute_dtype
from moe_dist.parallel.mesh import Layout


@contextmanager
def explained(config: Config, shape: BatchShape, layout: Layout, parameters: int) -> Iterator[None]:
    """Raises RuntimeError with advice in place of an error for want of memory; others pass.

    parameters: on this rank.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RuntimeError(f"out of memory: {advice(config, shape, layout, parameters)}") from error


def held_parameters(model: nn.Module) -> int:
    """Elements of the parameters on this rank; under ZeRO-3 of the whole ones that it holds pieces of."""
    return sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters())


def advice(config: Config, shape: BatchShape, layout: Layout, parameters: int) -> str:
    """Bytes for `parameters` on a rank, by what they are for, and what to change, the cheapest first."""
    engine, dp = config.engine, layout.dp
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    low = engine.precision == "bf16"
    weights = parameters * compute_dtype(engine.precision).itemsize // (dp if stage >= 3 else 1)
    gradients = parameters * 4 // (dp if stage >= 2 else 1)
    masters = low or stage >= 1  # ZeRO keeps them beside fp32 weights too
    optimizer = parameters * (12 if masters else 8) // (dp if stage >= 1 else 1)
    lines = [
        f"{parameters} parameters on this rank take about {_size(weights)} of weights, {_size(gradients)} of gradients "
        f"and {_size(optimizer)} of optimizer state, beside the activations of {shape.micro_batch} x {shape.seq_len} "
        f"tokens in {config.model.num_layers} blocks"
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
