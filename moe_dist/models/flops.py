"""How much arithmetic a token costs, from the config of a model alone; of a step, from what its experts did.

Everything is logical: the same numbers whatever the parallel layout and the backend. (How many parameters a model has:
parameters.py, which asks the model.)

| number   | experts that a token meets                     | for                                                    |
|----------|------------------------------------------------|--------------------------------------------------------|
| nominal  | top_k; under expert_choice those that take it  | MFU: dropped work counts, so dropping does not lower it |
| executed | those that computed one of its assignments     | MFU across capacity factors                             |
| at most  | nominal, less what no capacity could hold      | plans and budgets of runs that have not begun           |

All of it comes from one list, `forward_products`: which matrices the rows of a token are multiplied with. Whoever plans
a step takes the list itself, with the way in which ranks cut each product.

Legend: L layers, D d_model, F d_ff, E experts, K experts of a token, H query heads, G key/value heads, P width of a
head, S sequence, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.moe.experts import expert_widths, shared_width
from moe_dist.moe.losses import MoEStats

Part = Literal[
    "attention projections", "attention scores", "router", "experts", "shared experts", "dense feed-forwards", "logits"
]

Cut = Literal["columns", "rows", "key_values", "tokens", "expert_columns", "expert_rows"]
"""How ranks share a product. columns and rows: of the matrix, over tp. key_values: heads over tp as far as there are
any. tokens: each tp rank has its own slice of them. expert_columns and expert_rows: whole experts over ep, and the
columns or rows of each over etp."""


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, fan_in] x [fan_in, fan_out] for each token of a forward pass, `times` over all layers; means over tokens
    and layers, so sizes need not be whole."""

    part: Part
    cut: Cut
    rows: Fraction | float
    fan_in: Fraction | float
    fan_out: Fraction | float
    times: int
    experts: int = 1
    """Over the matrices of so many experts the rows are spread."""

    @property
    def flops(self) -> float:
        """Of one token, forward."""
        return float(2 * self.rows * self.fan_in * self.fan_out * self.times)


def forward_products(model: ModelConfig, seq_len: int, classifier: bool = False) -> list[Product]:
    """Every matrix product that a token of a sequence takes part in, in the order of the forward pass; nothing is
    dropped. Attention is a product of queries with the keys seen, and one of their weights with the values."""
    products = [*_attention_products(model, seq_len, classifier), *_feed_forward_products(model)]
    if classifier:  # of one mean for each sequence
        head = Fraction(1, seq_len)
        products.append(Product("logits", "columns", head, model.d_model, model.num_classes or 0, 1))
    else:
        products.append(Product("logits", "columns", 1, model.d_model, model.vocab_size, 1))
    return [product for product in products if product.times and product.flops]


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
    return 3 * sum(product.flops for product in forward_products(model, seq_len))


def classifier_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """As train_flops_per_token, for the encoder: a token sees all S of its sequence, and the head sees one mean.

    train = 3 * (2 * N + L * 2 * 2 * H * P * S + 2 * C * D / S)
    """
    return 3 * sum(product.flops for product in forward_products(model, seq_len, classifier=True))


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


def _attention_products(model: ModelConfig, seq_len: int, classifier: bool) -> Iterator[Product]:
    layers, d_model, attention = model.num_layers, model.d_model, model.attention
    heads, width, groups = model.num_heads, model.num_heads * model.head_width, model.num_kv_heads
    if attention.kind == "switch" and not classifier:
        top_k = attention.moe.top_k
        yield Product("router", "tokens", 1, d_model, _router_columns(attention.moe), layers)
        experts = attention.moe.num_experts
        yield Product("experts", "expert_columns", top_k, d_model, width, layers, experts)
        yield Product("experts", "expert_rows", top_k, width, d_model, layers, experts)
        heads *= top_k
    else:
        yield Product("attention projections", "columns", 1, d_model, width, layers)
        yield Product("attention projections", "rows", 1, width, d_model, layers)
    yield Product("attention projections", "key_values", 1, d_model, 2 * groups * model.head_width, layers)
    keys = float(seq_len) if classifier else _keys_seen(model, seq_len)
    yield Product("attention scores", "rows", 1, heads * model.head_width, keys, 2 * layers)
    if attention.kind == "routed" and not classifier:
        yield from _routed_products(model, seq_len)


def _routed_products(model: ModelConfig, seq_len: int) -> Iterator[Product]:
    """Of the routed part: its routers' scores, and the share that a token has in the Q queries and K keys of each
    expert in every window but the first."""
    routed, layers, d_model = model.attention.routed, model.num_layers, model.d_model
    width = model.num_heads * model.head_width
    window = routed.routed_window or routed.local_window
    windows = max(-(-seq_len // window) - 1, 0)
    queries = Fraction(routed.num_experts * min(routed.num_routed_queries, window) * windows, seq_len)
    keys = Fraction(routed.num_experts * routed.num_routed_key_values * windows, seq_len)
    yield Product("router", "tokens", 1, d_model, 2 * routed.num_experts, layers)
    yield Product("attention projections", "columns", queries, d_model, width, layers)
    yield Product("attention projections", "rows", queries, width, d_model, layers)
    yield Product(
        "attention projections", "key_values", keys, d_model, 2 * model.num_kv_heads * model.head_width, layers
    )
    yield Product("attention scores", "rows", queries, width, routed.num_routed_key_values + 1, 2 * layers)


def _feed_forward_products(model: ModelConfig) -> Iterator[Product]:
    moe, moe_layers = model.moe, _moe_layers(model)
    yield from _feed_forward("dense feed-forwards", 1, model, model.d_ff, model.num_layers - moe_layers)
    if not moe_layers:
        return
    widths = expert_widths(moe, model.d_ff)
    mean = Fraction(sum(widths), len(widths))
    yield Product("router", "tokens", 1, model.d_model, _router_columns(moe), moe_layers)
    for met, layers in Counter(experts_of_a_token(moe, index) for index in range(moe_layers)).items():
        yield from _feed_forward("experts", met, model, mean, layers)
    yield from _feed_forward("shared experts", 1, model, shared_width(moe, model.d_ff), moe_layers)
    if moe.shared_gate:
        yield Product("shared experts", "tokens", 1, model.d_model, 1, moe_layers)


def _feed_forward(
    part: Part, rows: Fraction | float, model: ModelConfig, hidden: Fraction | float, layers: int
) -> Iterator[Product]:
    into = 2 if gated(model.activation) else 1
    if part == "experts":
        yield Product(part, "expert_columns", rows, model.d_model, hidden, into * layers, model.moe.num_experts)
        yield Product(part, "expert_rows", rows, hidden, model.d_model, layers, model.moe.num_experts)
    else:
        yield Product(part, "columns", rows, model.d_model, hidden, into * layers)
        yield Product(part, "rows", rows, hidden, model.d_model, layers)


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
    """By a token, on average over the sequence and over layers."""
    attention = model.attention
    if attention.kind == "routed":
        return _within(attention.routed.local_window + 1, seq_len)
    windows = Counter(attention.window_of(layer) for layer in range(model.num_layers))
    return sum(layers * _within(window, seq_len) for window, layers in windows.items()) / model.num_layers


def _within(window: int | None, seq_len: int) -> float:
    """Keys of a window that a token sees, on average over the sequence."""
    window = min(window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def _router_columns(moe: MoEConfig) -> int:
    return {"noisy": 2, "hash": 0}.get(moe.router, 1) * moe.num_experts


def _moe_layers(model: ModelConfig) -> int:
    """How many layers are MoE."""
    return model.moe.layer_count(model.num_layers)


def _feed_forward_parameters(model: ModelConfig, d_ff: int) -> int:
    return (3 if gated(model.activation) else 2) * model.d_model * d_ff
