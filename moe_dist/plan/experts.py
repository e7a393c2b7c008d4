"""What autograd keeps of routed layers: router, the way to the experts and back, and the experts by backend.

Legend: t tokens that this rank routes, D d_model, F hidden width on this rank, E experts, e experts held here, K
experts of a token, Y rows sent, X rows that arrived, R rows of the experts held here, C rows of the fullest of them.

| kept by          | what                                                                                          |
|------------------|-----------------------------------------------------------------------------------------------|
| router           | logits and probabilities [t, E], choices and weights [t, K]; in bf16 its input in fp32 too      |
| gate of shared   | what it multiplies, [t, D] or of all tokens                                                    |
| dispatch         | X rows as they arrived and Y results as they came back; all_gather the tokens of all ranks      |
| grouped_mm, CPU  | the pre-activations [R, F] (kernels/grouped_mm/cpu.py)                                          |
| triton           | the pre-activations, and the activations but under recompute = activation                       |
| loop, grouped_mm | rows [R, D], pre-activations, activations; results [R, D] where they are weighed                |
| bmm              | the same, with rows and activations padded to e * C                                             |
"""

from dataclasses import replace

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.kernels.grouped_mm.onednn import ROUNDING
from moe_dist.moe.experts import expert_widths, shared_width
from moe_dist.plan.rows import Rows, rows_of, skew_of, skew_of_expert
from moe_dist.plan.stages import INDEX, WIDE, Sizes, Stage


def largest_factor(moe: MoEConfig, index: int) -> float | None:
    """The largest that is ever in force in this MoE layer; None: no limit."""
    factors = [moe.capacity_factor, *moe.capacity_schedule.values()]
    of_layer = [factor[index] if isinstance(factor, list) else factor for factor in factors]
    return None if None in of_layer else max(factor for factor in of_layer if factor is not None)


def choices(moe: MoEConfig) -> int:
    """K"""
    return moe.num_experts if moe.router == "expert_choice" else moe.top_k


def feed_forward(sizes: Sizes, d_ff: int, name: str, norm: bool = True) -> Stage:
    """Dense: norm, gate and up, hidden."""
    model, tokens = sizes.model, sizes.tokens
    hidden = sizes.numbers(tokens, d_ff // sizes.layout.tp)
    of_norm, norm_spike = sizes.feed_forward_norm() if norm else (0, 0)
    # Of one norm, attention keeps the same tokens, unless each of them gathers the sequence for itself.
    same = norm and model.block == "parallel" and not sizes.sequence_parallel
    kept = of_norm + hidden * _hidden_kept(model.activation)
    kept += 0 if same else sizes.numbers(tokens, model.d_model)
    plain = hidden * (3 if gated(model.activation) else 2) + sizes.numbers(tokens, model.d_model)
    spike = max(plain, hidden * (_hidden_spike(model.activation) - 1))  # the product's input has gone by then
    return Stage(name, kept, spike=sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))


def _hidden_kept(activation: str) -> int:
    """Tensors of hidden width that torch's autograd keeps for the activation and the product after it."""
    return {"relu": 1, "gelu": 2, "gelu_tanh": 2, "relu2": 2}.get(activation, 3)


def _hidden_spike(activation: str) -> int:
    """Tensors of hidden width that the backward pass of the activation holds at most (kernels/activation.py)."""
    return {"clamped_swiglu": 8}.get(activation, 3 if gated(activation) else 2)


def routed_rows(sizes: Sizes, moe: MoEConfig, factor: float | None, etp: int) -> Rows:
    """Of one layer."""
    if sizes.came is not None:
        return sizes.came
    model, layout = sizes.model, sizes.layout
    skew = one = 1.0
    if sizes.skewed:
        moe_layers = model.moe.layer_count(model.num_layers)
        skew = skew_of(moe, factor, layout.expert_ranks, layout.edp, 1 if model.recompute == "block" else moe_layers)
        one = skew_of_expert(moe, factor, layout.edp)
    return rows_of(moe, factor, sizes.routed, layout.expert_ranks, etp, skew, one)


def router_kept(sizes: Sizes, moe: MoEConfig) -> int:
    """Logits, probabilities, choices and weights."""
    tokens, chosen = sizes.routed, choices(moe)
    kept = tokens * (2 * WIDE * moe.num_experts + WIDE + INDEX + chosen * (INDEX + WIDE))
    if moe.renormalizes:
        kept += tokens * WIDE * (chosen + 2)
    if moe.router in ("sigmoid", "noisy"):
        kept += tokens * WIDE * moe.num_experts * (1 if moe.router == "sigmoid" else 4)
    if sizes.each < WIDE and moe.router != "hash":  # its input and its matrix in fp32
        kept += WIDE * (tokens + moe.num_experts) * sizes.model.d_model
    return kept


def routed_layer(sizes: Sizes, factor: float | None, elements: int, outputs: int, of_shared: int) -> list[Stage]:
    """Norm, router and the way there; the experts; the way back with the weighted sum; shared experts. elements: of all
    parameters. outputs, of_shared: of the experts' last matrices, and of shared experts with their gate."""
    elements -= of_shared
    model, layout, moe = sizes.model, sizes.layout, sizes.model.moe
    rows, width, local = routed_rows(sizes, moe, factor, layout.etp), model.d_model, moe.dispatch == "local"
    norm, norm_spike = sizes.feed_forward_norm()
    kept, shared = norm + router_kept(sizes, moe), _shared(sizes, of_shared) if moe.num_shared_experts else []
    # 1. The tokens that are routed: kept by the router in fp32, by the experts where nothing travels. Shared experts
    # keep all tokens, of which those are a copy under tp; so does attention, of the same norm.
    kept_before = moe.num_shared_experts or model.block == "parallel"
    if (local or sizes.each == WIDE) and (layout.tp > 1 or not kept_before):
        kept += sizes.numbers(sizes.routed, width)
    # 2. What travelled, and the orders in which rows lie.
    arrived, dispatch, back = (rows.arrived, 0, 0) if local else _travelled(sizes, rows)
    kept += rows.asked * (INDEX + 1) + rows.sent * 2 * INDEX + (0 if local else arrived * (3 * INDEX + 1))
    # 3. The experts. Torch's own operations are stages of their own: what the last keeps has gone when the first works.
    # Their backward pass comes after that of shared experts, whose gradient of the tokens waits for theirs.
    flow = sizes.numbers(sizes.outside, width) * (2 if shared else 1)
    travelling = 0 if local else sizes.numbers(arrived, width)
    if fused(sizes):
        of_experts, spike = _fused(sizes, rows)
        spike = flow + max(spike + travelling, norm_spike)
        return [
            Stage("experts", kept + of_experts, dispatch, spike, elements),
            Stage("experts' results", 0, back, spike=flow + back),
            *shared,
        ]
    gathered, pre, product = _of_torch(sizes, rows)
    row, unit = sizes.numbers(rows.arrived, width), sizes.numbers(rows.arrived, _hidden(sizes))
    hidden = unit * (2 if gated(model.activation) else 1)
    spike = flow + max(hidden + 2 * row + travelling, norm_spike)
    results, again = row if local else back, unit if model.recompute == "activation" else 0
    return [
        Stage("experts", kept + gathered, 0, spike, elements - outputs),
        Stage("experts' activation", pre, 0, flow + unit * _hidden_spike(model.activation)),
        Stage("experts' outputs", product, 0, flow + unit + again + row, outputs),
        Stage("experts' results", results - back, back, flow + results),
        *shared,
    ]


def _shared(sizes: Sizes, elements: int) -> list[Stage]:
    """Shared experts, and their gate, which keeps what it multiplies. elements: of their parameters."""
    model, moe = sizes.model, sizes.model.moe
    plain = feed_forward(sizes, shared_width(moe, model.d_ff), "shared experts", norm=False)
    if not moe.shared_gate:
        return [replace(plain, elements=elements)]
    y, gate = sizes.numbers(sizes.outside, model.d_model), sizes.numbers(sizes.outside)
    # Its input is the slice of which the others keep all tokens; the router keeps it too, in fp32.
    own = y if sizes.sequence_parallel and sizes.each < WIDE and moe.dispatch != "local" else 0
    return [replace(plain, elements=elements), Stage("gate of shared experts", y + gate + own, spike=2 * y)]


def fused(sizes: Sizes) -> bool:
    """Whether the experts are one operation, which keeps what arrived."""
    moe = sizes.model.moe
    return moe.experts == "triton" or (moe.experts == "grouped_mm" and not sizes.cuda)


def _travelled(sizes: Sizes, rows: Rows) -> tuple[int, int, int]:
    """(rows that arrive, bytes of them that are kept, bytes of results that are kept at home)."""
    moe, width, ranks = sizes.model.moe, sizes.model.d_model, sizes.layout.expert_ranks
    if moe.dispatch == "all_gather":  # all tokens of the group, and the weights of their choices
        tokens = sizes.routed * ranks
        return tokens, sizes.numbers(tokens, width) + tokens * choices(moe) * sizes.layout.etp * WIDE, 0
    if moe.dispatch == "all_to_all" and moe.wire == "padded":
        # A block for each expert from each rank, as large as the fullest.
        experts = moe.num_experts * sizes.layout.etp
        local = experts // ranks
        padded = min(rows.asked, -(-rows.fullest // ranks)) * local * ranks
        return padded, sizes.numbers(padded, width), sizes.numbers(rows.sent, width)
    return rows.arrived, sizes.numbers(rows.arrived, width), sizes.numbers(rows.sent, width)


def _hidden(sizes: Sizes) -> int:
    """F: the mean over experts, or the most that a rank's could be."""
    widths, etp = expert_widths(sizes.model.moe, sizes.model.d_ff), sizes.layout.etp
    return max(widths) // etp if sizes.skewed else sum(widths) // len(widths) // etp


def _fused(sizes: Sizes, rows: Rows) -> tuple[int, int]:
    """(kept for the backward pass, held by it for a moment)."""
    model, with_gate, hidden = sizes.model, gated(sizes.model.activation), _hidden(sizes)
    units, row = sizes.numbers(rows.arrived, hidden), sizes.numbers(rows.arrived, model.d_model)
    pre = 2 if with_gate else 1
    if model.moe.experts == "triton":
        again = 0 if model.recompute == "activation" else units
        return units * pre + again, units * (pre + 1) + row
    # On CPU expert by expert, each with its rows filled up to a rounder number (kernels/grouped_mm/cpu.py).
    fullest, local = rows.fullest, model.moe.num_experts * sizes.layout.etp // sizes.layout.expert_ranks
    made = 2 + pre + (6 if model.activation == "clamped_swiglu" else 0)
    one = sizes.numbers(fullest, hidden) * made + 2 * sizes.numbers(fullest, model.d_model)
    return (units + sizes.numbers(local * ROUNDING // 2, hidden)) * pre, one + row


def _of_torch(sizes: Sizes, rows: Rows) -> tuple[int, int, int]:
    """(rows, pre-activations, activations) that loop, bmm and torch's grouped GEMM keep."""
    model, moe, hidden = sizes.model, sizes.model.moe, _hidden(sizes)
    units, pre = sizes.numbers(rows.arrived, hidden), 2 if gated(model.activation) else 1
    gathered, product = sizes.numbers(rows.arrived, model.d_model), units
    if moe.experts == "bmm":
        padded = moe.num_experts * sizes.layout.etp // sizes.layout.expert_ranks * rows.fullest
        gathered, product = pre * sizes.numbers(padded, model.d_model), sizes.numbers(padded, hidden)
    if model.recompute == "activation":
        return gathered, units * pre, 0
    return gathered, units * (_hidden_kept(model.activation) - 1), product
