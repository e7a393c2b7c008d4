"""How big a model is and how much arithmetic a token costs, from its config alone.

Everything is logical: the same numbers whatever the parallel layout, the backend and the tokens dropped.

Legend: L layers, D d_model, F d_ff, E experts, H query heads, G key/value heads, P width of a head, S sequence,
V vocabulary.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.moe.experts import expert_widths


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Logical parameters of a model."""

    total: int
    """All of them; tied embeddings count once."""
    active: int
    """Those that one token meets: of routed and attention experts, top_k in each layer."""
    expert: int
    """Those of all routed and attention experts, which expert parallelism shards. Shared experts are not among them."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model.

    Each block has two RMSNorm scales, attention and a feed-forward of either kind; only experts can have biases:

        attention = D*H*P + 2*G*P*D + H*P*D             with qk_ln 2*(H + 1)*P more, with sinks H
        switch    = E*D + E*2*D*H*P + 2*P*D   of attention experts, one key/value head for all
        routed    = (1 + E) * attention + 3*E*D + E*2*G*P   local and routed, two routers, null tokens, keys and values
        dense     = m*D*F                     m = 3 with a gate (gate, up, down), else 2
        MoE       = E*D + (E + shared)*m*D*F  the router (noisy: twice; hash: none), then the experts with their own F,
                                              the mean where they differ
        model     = V*D (twice if not tied) + sum of blocks + D of the final norm
    """
    moe_layers = _moe_layers(model)
    embeddings = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    norms = (2 * model.num_layers + 1) * model.d_model + model.num_layers * _attention_vectors(model)
    each = _expert_parameters(model) + _expert_biases(model)
    expert = round(moe_layers * model.moe.num_experts * each)
    idle = round(moe_layers * (model.moe.num_experts - model.moe.top_k) * each)
    biases = round(moe_layers * model.moe.top_k * _expert_biases(model))
    if model.attention.kind == "switch":
        attention, projections = model.attention.moe, 2 * model.d_model * model.num_heads * model.head_width
        expert += model.num_layers * attention.num_experts * projections
        idle += model.num_layers * (attention.num_experts - attention.top_k) * projections
    far = model.num_layers * _routed_parameters(model) if model.attention.kind == "routed" else 0
    total = embeddings + norms + _active_block_matrices(model) + far + biases + idle
    return ParameterCounts(total=total, active=total - idle, expert=expert)


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs that training spends on one token, forward and backward, as model FLOPs utilization counts them.

    After PaLM (arXiv:2204.02311, appendix B), with causal attention counted once instead of as a full square:

        forward = 2 * N + L * 2 * 2 * H * P * (S + 1) / 2
        train   = 3 * forward

    With attention experts, a token has top_k * H heads. N are the matrix parameters that one token meets: attention,
    router, its top_k experts, shared experts, dense feed-forwards and the output projection; not the embedding lookup,
    not the norm scales. A token at position s attends to s + 1 keys, (S + 1) / 2 on average, or to those
    of its window, each costing a product for q.k and one for the weighted sum of v.

    The count does not depend on the capacity: a dropped assignment is work not done, so dropping does not lower it.
    Recomputation is not counted either: both would make a worse run look like a faster one.
    """
    matrices = _active_block_matrices(model) + model.vocab_size * model.d_model
    heads = model.num_heads * (model.attention.moe.top_k if model.attention.kind == "switch" else 1)
    attention = model.num_layers * 2 * 2 * heads * model.head_width * _keys_seen(model, seq_len)
    far = model.num_layers * _routed_flops(model, seq_len) if model.attention.kind == "routed" else 0
    return 3 * (2 * matrices + attention + far)


def classifier_parameter_counts(model: ModelConfig, max_len: int) -> ParameterCounts:
    """The same of the classifier: embedding V*D, positions max_len*D, blocks as above, head C*D + C; no final norm."""
    base = parameter_counts(replace(model, tie_embeddings=True))
    more = (max_len - 1) * model.d_model + (model.num_classes or 0) * (model.d_model + 1)
    return ParameterCounts(total=base.total + more, active=base.active + more, expert=base.expert)


def classifier_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As train_flops_per_token, for the encoder: a token sees all S of its sequence, and the head sees one mean.

    train = 3 * (2 * N + L * 2 * 2 * H * P * S + 2 * C * D / S)
    """
    attention = model.num_layers * 2 * 2 * model.num_heads * model.head_width * seq_len
    head = 2 * (model.num_classes or 0) * model.d_model / seq_len
    return 3 * (2 * _active_block_matrices(model) + attention + head)


def _active_block_matrices(model: ModelConfig) -> int:
    """Matrix parameters of all blocks that one token meets."""
    moe = model.moe
    moe_layers = _moe_layers(model)
    head_dim = model.head_width
    attention = 2 * model.d_model * head_dim * (model.num_heads + model.num_kv_heads)
    dense = _feed_forward_parameters(model, model.d_ff)
    routed = (moe.top_k + moe.num_shared_experts) * _expert_parameters(model) if moe_layers else 0
    experts = round(moe_layers * (_router_parameters(model, moe) + routed))
    if model.attention.kind == "switch":
        own = model.attention.moe
        attention = 2 * model.d_model * head_dim * (own.top_k * model.num_heads + 1) + _router_parameters(model, own)
    return model.num_layers * attention + (model.num_layers - moe_layers) * dense + experts


def _keys_seen(model: ModelConfig, seq_len: int) -> float:
    """By a token, on average over the sequence."""
    attention = model.attention
    near = attention.routed.local_window + 1 if attention.kind == "routed" else attention.window
    window = min(near or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def _attention_vectors(model: ModelConfig) -> int:
    """Norms and sinks of one layer."""
    heads, width = model.num_heads, model.head_width
    return (2 * (heads + 1) * width if model.attention.qk_ln else 0) + (heads if model.attention.sinks else 0)


def _routed_parameters(model: ModelConfig) -> int:
    """What a layer of routed attention has beside its local attention."""
    experts, width = model.attention.routed.num_experts, model.head_width
    matrices = 2 * model.d_model * width * (model.num_heads + model.num_kv_heads)
    return experts * (matrices + 3 * model.d_model + 2 * model.num_kv_heads * width)


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
    """Layers that are MoE: the nth, 2nth, ... with n = moe.every."""
    return model.num_layers // model.moe.every if model.moe.num_experts > 0 else 0


def _expert_parameters(model: ModelConfig) -> Fraction:
    """Matrices of one routed expert, the mean over experts."""
    widths = expert_widths(model.moe, model.d_ff)
    return Fraction(_feed_forward_parameters(model, sum(widths)), max(len(widths), 1))


def _expert_biases(model: ModelConfig) -> Fraction:
    widths = expert_widths(model.moe, model.d_ff)
    if not model.moe.expert_bias:
        return Fraction(0)
    return (2 if gated(model.activation) else 1) * Fraction(sum(widths), len(widths)) + model.d_model


def _feed_forward_parameters(model: ModelConfig, d_ff: int) -> int:
    return (3 if gated(model.activation) else 2) * model.d_model * d_ff
