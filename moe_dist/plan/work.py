"""What one rank computes in a micro-step, part by part, and how long that takes it alone: a roofline for each part.

| part                    | products                   | passes over bytes, forward + backward                    |
|-------------------------|----------------------------|----------------------------------------------------------|
| attention projections,  | models/flops.py, cut as it | none beside those of the products                        |
| attention scores,       | says; backward is twice    |                                                          |
| router, experts, shared | forward                    |                                                          |
| experts, dense          |                            |                                                          |
| feed-forwards, logits   |                            |                                                          |
| norms and residuals     |                            | a block: 10 + 12 over t * D, with one norm 8 + 9; each   |
|                         |                            | output bias 2 + 1                                        |
| query and key norms     |                            | a block, over T * (H + G) * P / tp: of each head 2 + 3,  |
|                         |                            | of all heads 7 + 18 and with a mean 12 + 25, of 4 bytes  |
| rotary                  |                            | a block: 5 + 5 over T * (H + G) * P / tp, as far as it   |
|                         |                            | turns; where it does not turn all, 2 + 6 over all        |
| activation              |                            | 3 + 5 over rows * F, gated; 2 + 3 without a gate; clamped|
|                         |                            | 10 + 23, in one Triton kernel 3 + 5                      |
| gate of shared experts  |                            | an MoE layer: 4 + 6 over t * D                           |
| routing                 |                            | an MoE layer: 12 + 4 over t' * E of 4 bytes              |
| permutation             |                            | an MoE layer: 2 K + 1 each way over t' * D; over ep also |
|                         |                            | 4 each way over what arrives                             |
| cross-entropy           |                            | 8 over T * V / tp of 4 bytes                             |

An element that is read or written counts once, at the width of activations unless bytes are given. These counts are
ours to make: how often a tensor is passed over by the operations of moe_dist/ as they stand. Attention keeps no scores
(backends flash and triton); `torch` does, and is dearer than planned.

Legend: T tokens of a micro-batch, t those that this rank has between tensor-parallel regions, t' = T / tp, D d_model,
F hidden width, E experts, K top_k, H query heads, G key/value heads, P width of a head, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.engine.base import compute_dtype
from moe_dist.kernels.activation import gated
from moe_dist.models.flops import Product, experts_of_a_token, forward_products
from moe_dist.moe.experts import expert_widths, shared_width
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group, Layout
from moe_dist.plan.hardware import Hardware
from moe_dist.plan.kept import factors_by_layer, kept_shares


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one part of a micro-step on one rank."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.forward + other.forward, self.backward + other.backward)


Passes = Callable[..., Seconds]
"""(elements, forward, backward[, times[, bytes of an element]]): how often they are passed over."""


@dataclass(frozen=True, slots=True)
class RankProduct:
    """One rank's share of a Product: [rows, fan_in] x [fan_in, fan_out] in all, spread over `groups` matrices."""

    product: Product
    rows: float
    fan_in: float
    fan_out: float
    groups: int

    @property
    def flops(self) -> float:
        """Of a forward pass, over all layers."""
        return 2 * self.rows * self.fan_in * self.fan_out * self.product.times


def rank_products(config: Config, shape: BatchShape, layout: Layout, skew: float = 1.0) -> list[RankProduct]:
    """Of one micro-step; experts are asked for equally often, this rank's `skew` times as often.

    Capacity bounds what experts compute, to the share that there are places for.
    """
    busy = kept_of(config, shape, layout) * bounded(config, layout, skew)
    products = forward_products(config.model, shape.seq_len, config.task == "classification")
    return [_cut(product, config.model, shape, layout, busy) for product in products]


def micro_step(
    config: Config, shape: BatchShape, layout: Layout, hardware: Hardware, skew: float = 1.0
) -> dict[str, Seconds]:
    """Of each part, without exchanges and without what is computed again.

    skew: rows of the busiest rank's experts over an even share. Raises ValueError where `hardware` lacks the precision.
    """
    found: dict[str, Seconds] = defaultdict(Seconds)
    precision = config.engine.precision
    for own in rank_products(config, shape, layout, skew):
        product = own.product
        if product.part == "attention scores":
            one = hardware.attention_seconds(precision, own.flops)
        else:
            one = product.times * hardware.product_seconds(precision, own.rows, own.fan_in, own.fan_out, own.groups)
        found[product.part] += Seconds(one, 2 * one)
    for part, seconds in _through_memory(config, shape, layout, hardware, skew).items():
        found[part] += seconds
    return dict(found)


def kept_of(config: Config, shape: BatchShape, layout: Layout) -> float:
    """Share of the assignments that experts have places for, the mean over MoE layers; 1 without any."""
    layers, attention = kept_shares(config.model, shape.micro_step_sequences * shape.seq_len, layout.world)
    both = [*layers, *([attention] * config.model.num_layers if config.model.attention.kind == "switch" else [])]
    return fmean(both) if both else 1.0


def bounded(config: Config, layout: Layout, skew: float) -> float:
    """The skew that capacity leaves: no rank gets more rows than its experts have places for, and where all ranks
    compete for the same places, any of edp copies can get those of all."""
    factors = factors_by_layer(config.model)
    if not factors or None in factors:
        return skew
    copies = layout.edp if config.model.moe.capacity_scope == "global" else 1
    return min(skew, max(1.0, *(factor for factor in factors if factor is not None)) * copies)


def _cut(product: Product, model: ModelConfig, shape: BatchShape, layout: Layout, busy: float) -> RankProduct:
    """busy: rows of this rank's experts over an even share of all assignments."""
    tp, etp = layout.tp, layout.etp
    rows = float(product.rows) * shape.micro_batch * shape.seq_len
    fan_in, fan_out, groups = float(product.fan_in), float(product.fan_out), 1
    match product.cut:
        case "columns":
            fan_out /= tp
        case "rows":
            fan_in /= tp
        case "key_values":
            fan_out *= _key_values_here(model, tp)
        case "tokens":
            rows /= tp
        case "expert_columns" | "expert_rows":
            rows *= busy * etp / tp  # every rank of etp sees the rows of all
            groups = product.experts // layout.ep
            if product.cut == "expert_columns":
                fan_out /= etp
            else:
                fan_in /= etp
    return RankProduct(product, rows, fan_in, fan_out, groups)


def _key_values_here(model: ModelConfig, tp: int) -> float:
    """Share of the key/value heads that the rank with most of them computes."""
    heads, groups = model.query_heads, model.num_kv_heads
    held = (HeadAssignment.of(heads, groups, Group(tuple(range(tp)), rank)).kv_held for rank in range(tp))
    return max(map(len, held)) / groups


def _through_memory(
    config: Config, shape: BatchShape, layout: Layout, hardware: Hardware, skew: float
) -> dict[str, Seconds]:
    """The last column of the table above."""
    model, moe = config.model, config.model.moe
    each, tp, width = compute_dtype(config.engine.precision).itemsize, layout.tp, model.d_model
    tokens = shape.micro_batch * shape.seq_len
    own = tokens / tp
    between = own if config.parallel.sequence_parallel else tokens
    moe_layers = moe.layer_count(model.num_layers)
    dense_layers = model.num_layers - moe_layers

    def passes(elements: float, forward: float, backward: float, times: float = 1, bytes_each: int = each) -> Seconds:
        # An operation passes over two or three tensors: the size by which a measured rate is looked up.
        one = hardware.memory_seconds(2 * elements * bytes_each) / 2
        return Seconds(times * forward * one, times * backward * one)

    of_norms = (8, 9) if model.block == "parallel" else (10, 12)
    found = {"norms and residuals": passes(between * width, *of_norms, model.num_layers)}
    biases = model.num_layers * model.attention.out_bias + moe_layers * moe.out_bias + dense_layers * model.ff_bias
    found["norms and residuals"] += passes(between * width, 2, 1, biases)
    heads = tokens * (model.num_heads / tp + model.num_kv_heads * _key_values_here(model, tp)) * model.head_width
    found["query and key norms"] = _query_key_norms(model, heads, passes)
    if model.attention.position == "rotary" and config.task != "classification":
        turned = model.rotary_width / model.head_width
        found["rotary"] = passes(heads * turned, 5, 5, model.num_layers)
        if turned < 1:
            found["rotary"] += passes(heads, 2, 6, model.num_layers)
    through, of_experts = _activation(model, fused=False), _activation(model, fused=moe.experts == "triton")
    found["activation"] = passes(tokens * model.d_ff / tp, *through, dense_layers)
    if moe_layers:
        kept = kept_of(config, shape, layout)
        widths = expert_widths(moe, model.d_ff)
        met = fmean(float(experts_of_a_token(moe, index)) for index in range(moe_layers))
        hidden, rows = fmean(widths), own * met * kept * bounded(config, layout, skew)
        found["activation"] += passes(rows * hidden, *of_experts, moe_layers)
        found["activation"] += passes(tokens * shared_width(moe, model.d_ff) / tp, *through, moe_layers)
        found["shared experts"] = passes(between * width, 4, 6, moe_layers * moe.shared_gate)
        found |= _routed(moe, own, met * kept, rows, width, layout, moe_layers, passes)
    columns = model.vocab_size / tp
    if config.task != "classification":
        found["cross-entropy"] = passes(tokens * columns, 8, 0, 1, 4)
    return {part: seconds for part, seconds in found.items() if seconds.forward > 0}


def _query_key_norms(model: ModelConfig, heads: float, passes: Passes) -> Seconds:
    """heads: numbers of all queries and keys of this rank."""
    if model.attention.qk_ln:
        return passes(heads, 12, 25, model.num_layers, 4)
    match model.attention.qk_norm:
        case "head":
            return passes(heads, 2, 3, model.num_layers)
        case "width":
            return passes(heads, 7, 18, model.num_layers, 4)
    return Seconds()


def _activation(model: ModelConfig, fused: bool) -> tuple[int, int]:
    """(forward, backward) passes over hidden units."""
    if not gated(model.activation):
        return 2, 3
    return (10, 23) if model.activation == "clamped_swiglu" and not fused else (3, 5)


def _routed(
    moe: MoEConfig, own: float, met: float, arrived: float, width: int, layout: Layout, layers: int, passes: Passes
) -> dict[str, Seconds]:
    """own: tokens of this rank. met: experts that compute one. arrived: rows that come to this rank's experts."""
    moved = passes(own * width, 2 * met + 1, 2 * met + 1, layers)
    if layout.expert_ranks > 1:
        moved += passes(arrived * layout.etp * width, 4, 4, layers)
    return {"routing": passes(own * moe.num_experts, 12, 4, layers, 4), "permutation": moved}
