"""How big a model is and how much arithmetic a token costs, from its config alone.

Everything is logical: the same numbers whatever the parallel layout, the backend and the tokens dropped.

Legend: L layers, D d_model, F d_ff, E experts, H query heads, G key/value heads, P width of a head, S sequence,
V vocabulary.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from moe_dist.config.schema import ModelConfig
from moe_dist.kernels.activation import gated
from moe_dist.moe.experts import expert_widths


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Logical parameters of a model."""

    total: int
    """All of them; tied embeddings count once."""
    active: int
    """Those that one token meets: of the routed experts, top_k in each MoE layer."""
    expert: int
    """Those of all routed experts, the ones that expert parallelism shards. Shared experts are not among them."""


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of a model.

    Each block has two RMSNorm scales, attention and a feed-forward of either kind; only experts can have biases:

        attention = D*H*P + 2*G*P*D + H*P*D
        dense     = m*D*F                     m = 3 with a gate (gate, up, down), else 2
        MoE       = E*D + (E + shared)*m*D*F  the router (noisy: twice; hash: none), then the experts with their own F,
                                              the mean where they differ
        model     = V*D (twice if not tied) + sum of blocks + D of the final norm
    """
    moe_layers = _moe_layers(model)
    embeddings = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    norms = (2 * model.num_layers + 1) * model.d_model
    each = _expert_parameters(model) + _expert_biases(model)
    expert = round(moe_layers * model.moe.num_experts * each)
    idle = round(moe_layers * (model.moe.num_experts - model.moe.top_k) * each)
    biases = round(moe_layers * model.moe.top_k * _expert_biases(model))
    total = embeddings + norms + _active_block_matrices(model) + biases + idle
    return ParameterCounts(total=total, active=total - idle, expert=expert)


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs that training spends on one token, forward and backward, as model FLOPs utilization counts them.

    After PaLM (arXiv:2204.02311, appendix B), with causal attention counted once instead of as a full square:

        forward = 2 * N + L * 2 * 2 * H * P * (S + 1) / 2
        train   = 3 * forward

    N are the matrix parameters that one token meets: attention, router, its top_k experts, shared experts, dense
    feed-forwards and the output projection; not the embedding lookup, not the norm scales. A token at position s
    attends to s + 1 keys, (S + 1) / 2 on average, each costing a product for q.k and one for the weighted sum of v.
    The count does not depend on the capacity: a dropped assignment is work not done, so dropping does not lower it.
    Recomputation is not counted either: both would make a worse run look like a faster one.
    """
    matrices = _active_block_matrices(model) + model.vocab_size * model.d_model
    attention = model.num_layers * 2 * 2 * model.num_heads * _head_dim(model) * (seq_len + 1) / 2
    return 3 * (2 * matrices + attention)


def classifier_parameter_counts(model: ModelConfig, max_len: int) -> ParameterCounts:
    """The same of the classifier: embedding V*D, positions max_len*D, blocks as above, head C*D + C; no final norm."""
    base = parameter_counts(replace(model, tie_embeddings=True))
    more = (max_len - 1) * model.d_model + (model.num_classes or 0) * (model.d_model + 1)
    return ParameterCounts(total=base.total + more, active=base.active + more, expert=base.expert)


def classifier_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As train_flops_per_token, for the encoder: a token sees all S of its sequence, and the head sees one mean.

    train = 3 * (2 * N + L * 2 * 2 * H * P * S + 2 * C * D / S)
    """
    attention = model.num_layers * 2 * 2 * model.num_heads * _head_dim(model) * seq_len
    head = 2 * (model.num_classes or 0) * model.d_model / seq_len
    return 3 * (2 * _active_block_matrices(model) + attention + head)


def _active_block_matrices(model: ModelConfig) -> int:
    """Matrix parameters of all blocks that one token meets."""
    moe = model.moe
    moe_layers = _moe_layers(model)
    head_dim = _head_dim(model)
    attention = 2 * model.d_model * head_dim * (model.num_heads + model.num_kv_heads)
    dense = _feed_forward_parameters(model, model.d_ff)
    routed = (moe.top_k + moe.num_shared_experts) * _expert_parameters(model) if moe_layers else 0
    router = {"noisy": 2, "hash": 0}.get(moe.router, 1) * moe.num_experts * model.d_model
    experts = round(moe_layers * (router + routed))
    return model.num_layers * attention + (model.num_layers - moe_layers) * dense + experts


def _moe_layers(model: ModelConfig) -> int:
    """Layers that are MoE: the nth, 2nth, ... with n = moe.every."""
    return model.num_layers // model.moe.every if model.moe.num_experts > 0 else 0


def _expert_parameters(model: ModelConfig) -> Fraction:
    """Matrices of one routed expert, the mean over experts."""
    widths = expert_widths(model)
    return Fraction(_feed_forward_parameters(model, sum(widths)), max(len(widths), 1))


def _expert_biases(model: ModelConfig) -> Fraction:
    widths = expert_widths(model)
    if not model.moe.expert_bias:
        return Fraction(0)
    return (2 if gated(model.activation) else 1) * Fraction(sum(widths), len(widths)) + model.d_model


def _feed_forward_parameters(model: ModelConfig, d_ff: int) -> int:
    return (3 if gated(model.activation) else 2) * model.d_model * d_ff


def _head_dim(model: ModelConfig) -> int:
    return model.d_model // model.num_heads if model.head_dim is None else model.head_dim
