"""How long an optimizer step takes: every part's own roofline, the exchanges by link, and what is hidden behind what.

    step = accumulation * (work.py's parts + what is computed again) + exchanges + update + host - hidden

| part                | from                                                                                      |
|---------------------|-------------------------------------------------------------------------------------------|
| compute             | work.py, forward and backward                                                             |
| recomputation       | recompute=block: the blocks' forward pass; activation: the experts' activation            |
| exchanges           | each Transfer by `exchange_seconds`: inside a node and between nodes at once, the slower  |
| optimizer           | bytes of an element that this rank updates: AdamW 28, its norm 4, in bf16 the copy 6      |
| gradient copies     | bytes of an element that it holds: `_copied`                                              |
| host                | hardware.host; on a GPU what of it is longer than all the device does                     |

What is hidden is only what the engines really overlap (`_hidden`):

| exchange             | behind            | how much                                                                |
|----------------------|-------------------|-------------------------------------------------------------------------|
| rows, overlap_chunks | the experts       | (n - 1) / n: the first chunk there and the last one back are seen; or   |
|                      |                   | as long as the experts compute                                          |
| ZeRO-3, on a GPU     | forward, backward | all but one block's: DeepSpeed fetches ahead, and reduces behind        |
| gradients, native    | the last backward | (n - 1) / n of the shorter one, n buckets of bucket_mib: the last,      |
|                      | pass of a step    | of the first layer, is seen. bucket_mib null: nothing                   |

Everything is what one rank does that is like the others; `skew` makes it the one whose experts are asked for most, for
which all others wait. MFU counts the FLOPs of models/flops.py (PaLM, arXiv 2204.02311, appendix B).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config import BatchShape, Config
from moe_dist.models.flops import classifier_flops_per_token, train_flops_per_token
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.bottleneck import Limits, advise
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.held import Held
from moe_dist.plan.transfer import Transfer, links
from moe_dist.plan.work import Seconds, bounded, micro_step, rank_products

_NOT_OF_BLOCKS = ("logits", "cross-entropy")
COMPUTE = (
    *("attention projections", "query and key norms", "attention scores", "rotary", "router", "routing", "permutation"),
    *("experts", "activation", "shared experts", "dense feed-forwards", "norms and residuals", "logits"),
    *("cross-entropy", "recomputation", "gradient copies", "optimizer", "host"),
)
EXCHANGES = ("dispatch", "tensor parallel", "ZeRO weights", "gradient exchange", "counts and losses")


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds of one optimizer step by part, what of it is hidden, and what limits it.

    parts: of COMPUTE and EXCHANGES, those that take any time. hidden: seconds of exchanges that pass behind compute.
    seconds: of the step. flops: of the model, over all ranks, as MFU counts them. mfu: flops over what all ranks could
    do in that time. bottleneck: the part that takes most. advice: what to change.
    """

    parts: dict[str, float]
    hidden: float
    seconds: float
    flops: float
    mfu: float
    bottleneck: str
    advice: str


def step_time(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    hardware: Hardware,
    transfers: Sequence[Transfer],
    held: Held,
    skew: float = 1.0,
) -> TimePlan:
    """transfers: of one rank in one optimizer step. held: elements of its parameters before ZeRO cuts them. skew: rows
    of the busiest rank's experts over an even share, at least 1.

    Raises ValueError where `hardware` does not know the precision.
    """
    compute = micro_step(config, shape, layout, hardware, skew)
    exchanges = Exchanges.of(transfers, layout, hardware)
    parts, hidden = parts_of_step(config, shape, layout, hardware, compute, exchanges, held, skew)
    seconds = sum(parts.values()) - hidden
    flops = shape.tokens_per_step * model_flops(config)
    told = {name: parts[name] for name in (*COMPUTE, *EXCHANGES) if parts[name] > 0}
    limits = _limits(config, shape, layout, hardware, transfers, skew)
    bottleneck, advice = advise(config, layout, told, hidden, limits)
    mfu = flops / (seconds * layout.world * hardware.peak(config.engine.precision))
    return TimePlan(told, hidden, seconds, flops, mfu, bottleneck, advice)


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What transfers take with even routing, seconds by part of EXCHANGES, and the bytes of gradients among them."""

    seconds: dict[str, float]
    gradients: int

    @staticmethod
    def of(transfers: Sequence[Transfer], layout: Layout, hardware: Hardware) -> "Exchanges":
        found: dict[str, float] = defaultdict(float)
        for transfer in transfers:
            found[part_of(transfer)] += exchange_seconds(transfer, layout, hardware)
        return Exchanges(found, sum(each.bytes for each in transfers if each.phase == "gradients"))

    def and_then(self, other: "Exchanges", times: int = 1) -> "Exchanges":
        """Both, the others so many times."""
        parts = self.seconds.keys() | other.seconds.keys()
        seconds = {part: self.seconds.get(part, 0.0) + times * other.seconds.get(part, 0.0) for part in parts}
        return Exchanges(seconds, self.gradients + times * other.gradients)


def parts_of_step(
    config: Config,
    shape: BatchShape,
    layout: Layout,
    hardware: Hardware,
    compute: dict[str, Seconds],
    exchanges: Exchanges,
    held: Held,
    skew: float = 1.0,
) -> tuple[dict[str, float], float]:
    """(seconds by part, what of them is hidden). compute: of a micro-step."""
    parts: dict[str, float] = defaultdict(float)
    for part, of_micro_step in compute.items():
        parts[part] = shape.accumulation * (of_micro_step.forward + of_micro_step.backward)
    parts["recomputation"] = shape.accumulation * recomputed(config, compute)
    for part, seconds in exchanges.seconds.items():
        parts[part] = seconds * (bounded(config, layout, skew) if part == "dispatch" else 1.0)
    parts["optimizer"], parts["gradient copies"] = update_seconds(config, shape, layout, hardware, held)
    backward = sum(each.backward for each in compute.values())
    hidden = _hidden(config, hardware, exchanges.gradients, parts, backward)
    host = _host(config, shape, hardware)
    parts["host"] = host if hardware.device == "cpu" else max(0.0, host - (sum(parts.values()) - hidden))
    return parts, hidden


def model_flops(config: Config) -> float:
    """Of one token, forward and backward, as MFU counts them."""
    count = classifier_flops_per_token if config.task == "classification" else train_flops_per_token
    return count(config.model, config.train.seq_len)


def part_of(transfer: Transfer) -> str:
    """One of EXCHANGES."""
    if transfer.phase == "gradients":
        return "gradient exchange"
    if transfer.phase in ("update", "statistics"):
        return "ZeRO weights" if transfer.axis in ("dp", "edp") else "counts and losses"
    by_axis = {"tp": "tensor parallel", "dp": "ZeRO weights", "edp": "ZeRO weights", "world": "counts and losses"}
    return by_axis.get(transfer.axis, "dispatch")


def exchange_seconds(transfer: Transfer, layout: Layout, hardware: Hardware) -> float:
    """Of all its calls, one after the other. All groups of the axis exchange at the same time, so the ranks of a node
    share what leaves it."""
    inside, between = (sent / transfer.calls for sent in links(transfer, hardware.ranks_per_node))
    size, here = len(transfer.ranks), min(hardware.ranks_per_node, layout.world)
    slowest = hardware.link("inside").seconds(transfer.collective, inside, size) if inside or not between else 0.0
    if between:
        slowest = max(slowest, hardware.link("between").seconds(transfer.collective, here * between, size))
    return transfer.calls * slowest


def recomputed(config: Config, compute: dict[str, Seconds]) -> float:
    """Seconds of one micro-step that are computed again."""
    match config.model.recompute:
        case "block":
            return sum(seconds.forward for part, seconds in compute.items() if part not in _NOT_OF_BLOCKS)
        case "activation":
            return compute["activation"].forward if config.model.moe.num_experts else 0.0
    return 0.0


def update_seconds(
    config: Config, shape: BatchShape, layout: Layout, hardware: Hardware, held: Held
) -> tuple[float, float]:
    """(optimizer, gradient copies) of one optimizer step."""
    engine = config.engine
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    low = engine.precision == "bf16"
    whole = held.dense + held.expert
    owned = held.dense / layout.dp + held.expert / layout.edp if stage >= 1 else whole
    copied = whole * _copied(engine.name, low, layout.dp > 1, shape.accumulation)
    return hardware.memory_seconds(owned * (28 + 4 + (6 if low else 0))), hardware.memory_seconds(copied)


def _copied(engine: str, low: bool, reduced: bool, accumulation: int) -> int:
    """Bytes that are read and written for an element's gradient in a step, beside backward, exchange and update.

    native: into the master's, which is the same in fp32 unless it lies in a bucket; each later micro-step adds to it;
    the mean over dp reads and writes it. deepspeed: into a bucket and back, and the mean, 24.
    """
    each = 2 if low else 4
    later = (each + 8) * (accumulation - 1)
    if engine == "deepspeed":
        return (6 if low else 0) + later + (24 if reduced else 0)
    return (each + 4 if low or reduced else 0) + later + (8 if reduced else 0)


def _hidden(config: Config, hardware: Hardware, gradients: int, parts: dict[str, float], backward: float) -> float:
    """Seconds of exchanges that pass while something is computed; the table at the top, row by row. gradients: bytes
    that are exchanged. backward: seconds of computing one backward pass."""
    hidden = 0.0
    chunks = config.model.moe.overlap_chunks
    if chunks > 1:
        hidden += min((chunks - 1) / chunks * parts["dispatch"], parts["experts"] + parts["activation"])
    engine, blocks = config.engine, config.model.num_layers
    if engine.name == "deepspeed" and engine.zero_stage == 3 and hardware.device == "cuda":
        busy = sum(parts[part] for part in COMPUTE if part not in ("optimizer", "host"))
        hidden += (blocks - 1) / blocks * min(parts["ZeRO weights"] + parts["gradient exchange"], busy)
    if engine.name == "native" and engine.bucket_mib is not None:
        buckets = max(1, math.ceil(gradients / (engine.bucket_mib * 2**20)))
        hidden += (buckets - 1) / buckets * min(parts["gradient exchange"], backward)
    return hidden


def _host(config: Config, shape: BatchShape, hardware: Hardware) -> float:
    model, host = config.model, hardware.host
    moe_layers = model.moe.layer_count(model.num_layers)
    blocks = moe_layers * host.moe_block + (model.num_layers - moe_layers) * host.dense_block
    blocks *= 4 / 3 if model.recompute == "block" else 1  # of a forward and a backward of twice as much, one forward
    micro = 0.0 if config.engine.cuda_graph else host.micro_step + blocks
    return shape.accumulation * micro + host.step


def _limits(
    config: Config, shape: BatchShape, layout: Layout, hardware: Hardware, transfers: Sequence[Transfer], skew: float
) -> Limits:
    """What the advice wants to know."""
    own = [each for each in rank_products(config, shape, layout, skew) if each.product.part == "experts"]
    rows = min((each.rows / each.groups for each in own), default=0.0)
    across = {part_of(each) for each in transfers if links(each, hardware.ranks_per_node)[1]}
    return Limits(rows, across, shape.micro_batch, hardware.ranks_per_node)
