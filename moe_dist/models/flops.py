"""How much arithmetic a token costs, from the config of a model alone; of a step, from what its experts did.

Everything is logical: the same numbers whatever the parallel layout and the backend. (How many parameters a model has:
parameters.py, which asks the model.)

| number   | experts that a token meets                     | for                                                    |
|----------|------------------------------------------------|--------------------------------------------------------|
| nominal  | top_k; under expert_choice those that take it  | MFU: dropped work counts, so dropping does not lower it |
| executed | those that computed one of its assignments     | MFU across capacity factors                             |
| at most  | nominal, less what no capacity could hold      | plans and budgets of runs that have not begun           |

Legend: L layers, D d_model, F d_ff, E experts, K experts of a token, H query heads, G key/value heads, P width of a
head, S sequence, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Literal

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.moe.experts import expert_widths
from moe_dist.moe.losses import MoEStats


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs that training spends on one token, forward and backward, as model FLOPs utilization counts them.

    After PaLM (arXiv:2204.02311, appendix B), with causal attention counted once instead of as a full square:

        forward = 2 * N + L * 2 * 2 * H * P * (S + 1) / 2
        train   = 3 * forward

    With attention experts, a token has top_k * H heads. N are the matrix parameters that one token meets: attention,
    router, its K experts, shared experts, dense feed-forwards and the output projection; not the embedding lookup,
    not the norm scales. A token at position s attends to s + 1 keys, (S + 1) / 2 on average, or to those
    of its window, each costing a product for q.k and one for the weighted sum of v.

    The count does not depend on what is dropped: a dropped assignment is work not done, so dropping does not lower it
    (`executed_flops` leaves it out). Recomputation is not counted either: both would make a worse run look like a
    faster one. Under expert_choice nothing is dropped, and the capacity says how many experts a token meets.
    """
    matrices = _active_block_matrices(model) + model.vocab_size * model.d_model
    heads = model.num_heads * (model.attention.moe.top_k if model.attention.kind == "switch" else 1)
    attention = 2 * 2 * heads * model.head_width * _keys_seen(model, seq_len)
    far = model.num_layers * _routed_flops(model, seq_len) if model.attention.kind == "routed" else 0
    return 3 * (2 * matrices + attention + far)


def classifier_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As train_flops_per_token, for the encoder: a token sees all S of its sequence, and the head sees one mean.

    train = 3 * (2 * N + L * 2 * 2 * H * P * S + 2 * C * D / S)
    """
    attention = model.num_layers * 2 * 2 * model.num_heads * model.head_width * seq_len
    head = 2 * (model.num_classes or 0) * model.d_model / seq_len
    return 3 * (2 * _active_block_matrices(model) + attention + head)


def executed_flops(model: ModelConfig, nominal: float, tokens: float, layers: Iterable[MoEStats]) -> float:
    """FLOPs of a step's `tokens` with the assignments that experts computed in place of those of the configuration.

    nominal: of one token, from one of the functions above. layers: what each layer of experts did with these tokens.
    Heads of attention experts whose assignment was dropped are attended with all the same.
    """
    outside = nominal - 3 * 2 * float(_met_expert_matrices(model))
    done = 0
    for layer in layers:
        costs = _expert_matrices(model, layer.site.kind)
        done += sum(rows * each for rows, each in zip(layer.kept_E.tolist(), costs, strict=True))
    return outside * tokens + 3 * 2 * done


def flops_at_most(model: ModelConfig, nominal: float, kept: Sequence[float], kept_by_attention: float = 1.0) -> float:
    """FLOPs of one token if of the assignments of each MoE layer no more than that share can be computed.

    nominal: of one token, from one of the functions above. kept: for each MoE layer, 0 to 1. kept_by_attention: of the
    assignments of attention experts in each layer.
    """
    never = _met_expert_matrices(model) - _met_expert_matrices(model, kept, kept_by_attention)
    return nominal - 3 * 2 * float(never)


def expert_rows_per_token(model: ModelConfig, kept: Sequence[float], kept_by_attention: float = 1.0) -> float:
    """Rows of a token that experts receive, over all layers; arguments as in `flops_at_most`."""
    rows = sum(share * float(experts_of_a_token(model.moe, index)) for index, share in enumerate(kept))
    if model.attention.kind == "switch":
        rows += kept_by_attention * model.num_layers * model.attention.moe.top_k
    return rows


def experts_of_a_token(moe: MoEConfig, index: int) -> Fraction:
    """K of MoE layer number `index`: top_k; under expert_choice the mean over tokens of those that take it, as
    capacity_factor says (capacity_schedule is for executed_flops)."""
    if moe.router != "expert_choice":
        return Fraction(moe.top_k)
    factor = moe.capacity_factor[index] if isinstance(moe.capacity_factor, list) else moe.capacity_factor
    assert factor is not None, "config/rules/moe.py asks for it"
    return min(Fraction(str(factor)) * moe.top_k, Fraction(moe.num_experts))


def _active_block_matrices(model: ModelConfig) -> float:
    """Matrix parameters of all blocks that one token meets."""
    moe, moe_layers = model.moe, _moe_layers(model)
    attention = 2 * model.d_model * model.head_width * (model.num_heads + model.num_kv_heads)
    if model.attention.kind == "switch":
        attention = 2 * model.d_model * model.head_width + _router_parameters(model, model.attention.moe)
    dense = _feed_forward_parameters(model, model.d_ff)
    beside = 0
    if moe_layers:  # without a width of their own, shared experts are as wide as the mean of the others
        widths = expert_widths(model.moe, model.d_ff)
        width = moe.shared_d_ff or sum(widths) // len(widths)
        shared = moe.num_shared_experts * _feed_forward_parameters(model, width) + moe.shared_gate * model.d_model
        beside = moe_layers * (_router_parameters(model, moe) + shared)
    blocks = model.num_layers * attention + (model.num_layers - moe_layers) * dense + beside
    return float(blocks + _met_expert_matrices(model))


def _met_expert_matrices(
    model: ModelConfig, kept: Sequence[float] | None = None, kept_by_attention: float = 1.0
) -> Fraction:
    """Matrix parameters of routed and attention experts of all blocks that one token meets, on average. kept: the share
    of each MoE layer's assignments that is computed; all of None."""
    met = Fraction(0)
    for index, share in enumerate([1.0] * _moe_layers(model) if kept is None else kept):
        each = _expert_matrices(model, "feed_forward")
        met += Fraction(share) * experts_of_a_token(model.moe, index) * Fraction(sum(each), len(each))
    if model.attention.kind == "switch":
        heads = model.attention.moe.top_k * _expert_matrices(model, "attention")[0]
        met += Fraction(kept_by_attention) * model.num_layers * heads
    return met


def _expert_matrices(model: ModelConfig, kind: Literal["feed_forward", "attention"]) -> list[int]:
    """Matrix parameters of each expert of a layer."""
    if kind == "attention":
        return [2 * model.d_model * model.num_heads * model.head_width] * model.attention.moe.num_experts
    return [_feed_forward_parameters(model, width) for width in expert_widths(model.moe, model.d_ff)]


def _keys_seen(model: ModelConfig, seq_len: int) -> float:
    """By a token, on average over the sequence; the sum over layers."""
    attention = model.attention
    if attention.kind == "routed":
        return model.num_layers * _within(attention.routed.local_window + 1, seq_len)
    windows = Counter(attention.window_of(layer) for layer in range(model.num_layers))
    return sum(layers * _within(window, seq_len) for window, layers in windows.items())


def _within(window: int | None, seq_len: int) -> float:
    """Keys of a window that a token sees, on average over the sequence."""
    window = min(window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def _routed_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of one layer's routed part for a token, on average: its routers' scores, and the share that it has
    in the Q queries and K keys of each expert in every window but the first."""
    routed, heads, groups, width = model.attention.routed, model.num_heads, model.num_kv_heads, model.head_width
    window = routed.routed_window or routed.local_window
    queries = min(routed.num_routed_queries, window)
    each = queries * 4 * width * heads * (model.d_model + routed.num_routed_key_values + 1)
    each += routed.num_routed_key_values * 4 * model.d_model * groups * width
    windows = max(-(-seq_len // window) - 1, 0)
    return routed.num_experts * (4 * model.d_model + each * windows / seq_len)


def _router_parameters(model: ModelConfig, moe: MoEConfig) -> int:
    return {"noisy": 2, "hash": 0}.get(moe.router, 1) * moe.num_experts * model.d_model


def _moe_layers(model: ModelConfig) -> int:
    """How many layers are MoE."""
    return model.moe.layer_count(model.num_layers)


def _feed_forward_parameters(model: ModelConfig, d_ff: int) -> int:
    return (3 if gated(model.activation) else 2) * model.d_model * d_ff
