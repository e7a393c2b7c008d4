"""What to say when memory does not suffice, or will not: how much is needed for what, and what to change.

Every change is planned in turn (memory.py), so that it says what it would save; one that the rules of the configuration
refuse, or that saves nothing, is not named. The cheapest come first: what costs no time and changes no number, then
what computes or sends more, last what changes the precision.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_dist.config import BatchShape, Config, batch_shape, validate
from moe_dist.config.rules.memory import in_units
from moe_dist.config.schema import EngineConfig
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.hardware import load_hardware
from moe_dist.plan.memory import MemoryPlan, fullest, memory

_FAR = 2  # ranks differ by less than that: where the first is so far from the limit, the others need not be asked


@dataclass(frozen=True, slots=True)
class Change:
    """Of a configuration. words: what to do. config: the changed one."""

    words: str
    config: Config


@contextmanager
def explained(
    config: Config, shape: BatchShape, layout: Layout, rank: int = 0, device_type: str = "cuda"
) -> Iterator[None]:
    """Raises RuntimeError with advice in place of an error for want of memory; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        said = advice(config, shape, layout, rank, device_type=device_type)
        raise RuntimeError(f"out of memory: {said}") from error


def shortage(
    config: Config, shape: BatchShape, layout: Layout, ranks: Sequence[int], available: int, device_type: str = "cuda"
) -> tuple[str | None, str | None]:
    """(why this cannot run, why it may not), each with advice, or None. ranks: those that share the `available` bytes.

    Parameters, gradients and optimizer state are known to the byte and are all there before an update: a run for which
    these alone are too much is not worth starting. The rest is an estimate, of which a person should know.
    """
    first = memory(config, shape, layout, ranks[0], device_type=device_type)
    if _FAR * len(ranks) * first.total <= available:
        return None, None
    plans = [memory(config, shape, layout, rank, device_type=device_type) for rank in ranks]
    surely, likely = sum(plan.sure for plan in plans), sum(plan.total for plan in plans)
    whose = "a rank" if len(ranks) == 1 else f"the {len(ranks)} ranks of this machine"
    if likely <= available:
        return None, None
    said = advice(config, shape, layout, ranks[0], device_type=device_type, available=available // len(ranks))
    here = f"{in_units(available)} of memory"
    if surely > available:
        sure = f"{in_units(surely)} of parameters, gradients and optimizer state on {whose}"
        return f"{sure} do not fit into {here}: {said}", None
    return None, f"{whose} may need {in_units(likely)}, more than the {here} here: {said}"


def planned_memory(
    config: Config, ranks: int, ranks_per_node: int, hardware: str | None, *, device_type: str = "cuda"
) -> str:
    """What the fullest rank is planned to take, as a line. hardware: name or file of what the nodes are; device_type
    stands for it where nobody knows, and nothing is refused.

    Raises ValueError with advice where the plan, its margin for skewed routing included, does not fit; where there is
    no such hardware; and for every rule that the configuration breaks on so many ranks.
    """
    known = None if hardware is None else load_hardware(hardware)
    device_type = device_type if known is None else known.device
    shape, parallel = validate(config, ranks), config.parallel
    layout = Layout(ranks, parallel.ep, parallel.tp, parallel.node_size or ranks_per_node, parallel.etp)
    rank, plan = fullest(config, shape, layout, device_type=device_type)
    takes = f"a rank is planned to take {in_units(plan.total)} of memory"
    if known is None:
        return f"{takes}; with --hardware NAME, what does not fit is refused"
    usable = known.memory.usable
    if plan.total > usable:
        said = advice(config, shape, layout, rank, device_type=device_type, available=usable)
        raise ValueError(f"{takes}, more than the {in_units(usable)} of {known.name}: {said}")
    return f"{takes}, of the {in_units(usable)} of {known.name}"


def advice(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    rank: int = 0,
    *,
    device_type: str = "cuda",
    available: int | None = None,
) -> str:
    """Bytes for what a rank holds, by what they are for, and what to change, the cheapest first, with what it saves.

    available: bytes of a rank, where they are known.
    """
    plan = memory(config, shape, layout, rank, device_type=device_type)
    lines = [_said(plan)]
    for change, after in savings(config, layout, rank, plan, device_type=device_type):
        fits = available is not None and after.total <= available < plan.total
        lines.append(f"{change.words} saves {in_units(plan.total - after.total)}" + (", and would fit" if fits else ""))
    return "; ".join(lines)


def savings(
    config: Config, layout: Layout, rank: int, plan: MemoryPlan, *, device_type: str = "cuda"
) -> Iterator[tuple[Change, MemoryPlan]]:
    """Every change that saves a hundredth or more of `plan`, and the plan after it."""
    for change in changes(config, layout):
        parallel = change.config.parallel
        try:
            shape = validate(change.config, layout.world)
            changed = Layout(layout.world, parallel.ep, parallel.tp, layout.node_size, parallel.etp)
            after = memory(change.config, shape, changed, rank, device_type=device_type)
        except ValueError:
            continue  # not possible, or not with what else is asked for
        if after.total <= 0.99 * plan.total:
            yield change, after


def changes(config: Config, layout: Layout) -> Iterator[Change]:
    """All that could be tried, the cheapest first; some may break a rule."""
    train, model, parallel, engine = config.train, config.model, config.parallel, config.engine
    micro = batch_shape(train, layout.dp).micro_batch
    if micro > 1:
        smaller = max(size for size in range(1, micro) if micro % size == 0)
        less = replace(config, train=replace(train, micro_batch=smaller, accumulation=None))
        yield Change(f"lower train.micro_batch to {smaller} (it is {micro}; gradients accumulate over the rest):", less)
    elif train.seq_len > 1:
        half = replace(config, train=replace(train, seq_len=train.seq_len // 2))
        yield Change(f"train.micro_batch is 1 already; lower train.seq_len to {half.train.seq_len}:", half)
    for recompute in ("activation", "block"):
        if recompute != model.recompute and model.recompute != "block":
            again = replace(config, model=replace(model, recompute=recompute))
            yield Change(f"set model.recompute to {recompute} (it is {model.recompute}):", again)
    if parallel.tp > 1 and not parallel.sequence_parallel:
        cut = replace(config, parallel=replace(parallel, sequence_parallel=True))
        yield Change("set parallel.sequence_parallel to true:", cut)
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    for more in range(stage + 1, 4 if layout.dp > 1 else 0):
        zero: EngineConfig = replace(engine, name="deepspeed", zero_stage=more)
        named = "" if engine.name == "deepspeed" else "engine.name to deepspeed and "
        yield Change(
            f"set {named}engine.zero_stage to {more} (it is {stage}, over {layout.dp} ranks):",
            replace(config, engine=zero),
        )
    for name, most in (("ep", model.moe.num_experts), ("tp", model.num_heads)):
        size = getattr(parallel, name)
        for larger in range(size + 1, min(most, layout.world) + 1):
            if most % larger == 0 and layout.world % larger == 0:
                values: dict[str, Any] = {name: larger}
                spread = replace(config, parallel=replace(parallel, **values))
                yield Change(f"raise parallel.{name} to {larger} (it is {size}, on {layout.world} ranks):", spread)
                break
    if engine.precision != "bf16":
        low = replace(config, engine=replace(engine, precision="bf16"))
        yield Change("set engine.precision to bf16 (it is fp32):", low)


def _said(plan: MemoryPlan) -> str:
    parts = [f"{in_units(size)} of {name}" for name, size in plan.parts.items() if size and name != "margin"]
    margin = f", and up to {in_units(plan.margin)} more where routing is skewed" if plan.margin else ""
    return f"a rank takes about {in_units(plan.expected)} at most ({plan.moment}): {', '.join(parts)}{margin}"


def _is_out_of_memory(error: BaseException) -> bool:
    said = str(error)
    known = ("DefaultCPUAllocator: can't allocate", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in said for words in known)
