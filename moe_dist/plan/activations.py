"""What autograd keeps of a micro-step from the forward to the backward pass, layer by layer, and what backward needs.

A stage is a part of the model whose kept tensors go when its backward pass is done. What each operation keeps is read
off the layers: a product its input, RMSNorm its input and 1 / rms, attention its queries, keys and values and what its
backend remembers of the weights, the gated activations their two inputs (kernels/activation.py), the CPU's and Triton's
experts no rows but those that arrived, a dispatcher the rows that came back. A tensor that two operations keep counts
once, with the one that comes first. tests/unit/plan/test_live_memory.py compares with a step that runs.

Legend: B batch, S sequence, T = B * S tokens of a data-parallel rank, t of them that this rank routes, o outside
tensor-parallel regions, D d_model, M numbers of a token over this rank's query heads, P width of a head, G key/value
heads that they read, F hidden width on this rank, E experts, e experts held here, K experts of a token, V vocabulary on
this rank, a bytes of a number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.engine.base import compute_dtype
from moe_dist.kernels.activation import gated
from moe_dist.kernels.attention.packed import blocks
from moe_dist.kernels.grouped_mm.onednn import ROUNDING
from moe_dist.models.block import is_moe_layer
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.loss import chunk_tokens
from moe_dist.parallel.mesh import Group, Layout
from moe_dist.plan.held import BLOCKS, Held
from moe_dist.plan.rows import Rows, rows_of, skew_of, skew_of_expert

_WIDE = 4  # bytes of what is computed in fp32 whatever the precision
_INDEX = 8  # bytes of an index
_MARKS = 4  # by what drops are counted: marks of a token


@dataclass(frozen=True, slots=True)
class Stage:
    """kept: bytes from its forward to its backward pass. dispatch: of rows that travelled, kept too. spike: the most
    that its backward pass holds besides for a moment, gradients of parameters apart. elements: of the parameters whose
    gradients it makes. logits: a part of the spike."""

    name: str
    kept: int
    dispatch: int = 0
    spike: int = 0
    elements: int = 0
    logits: int = 0

    @property
    def all_kept(self) -> int:
        return self.kept + self.dispatch


@dataclass(frozen=True, slots=True)
class Block:
    """Stages of a block in forward order. again: where it is recomputed, what is kept of it until then."""

    stages: tuple[Stage, ...]
    again: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one micro-step on one rank. model: with its backends named. skewed: as routing can be, not as it should."""

    model: ModelConfig
    layout: Layout
    rank: int
    batch: int
    seq_len: int
    sequence_parallel: bool
    dtype: torch.dtype
    cuda: bool
    skewed: bool

    @staticmethod
    def of(
        config: Config, shape: BatchShape, layout: Layout, rank: int, model: ModelConfig, cuda: bool, skewed: bool
    ) -> "Sizes":
        dtype, cut = compute_dtype(config.engine.precision), config.parallel.sequence_parallel and layout.tp > 1
        return Sizes(model, layout, rank, shape.micro_batch, shape.seq_len, cut, dtype, cuda, skewed)

    @property
    def each(self) -> int:
        """a"""
        return self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """T"""
        return self.batch * self.seq_len

    @property
    def routed(self) -> int:
        """t"""
        return self.tokens // self.layout.tp

    @property
    def outside(self) -> int:
        """o"""
        return self.routed if self.sequence_parallel else self.tokens

    @property
    def heads(self) -> HeadAssignment:
        tp = self.layout.ranks("tp", self.rank)
        return HeadAssignment.of(self.model.num_heads, self.model.num_kv_heads, Group(tp, tp.index(self.rank)))

    def numbers(self, *sizes: int) -> int:
        """Bytes of a tensor of so many rows and columns."""
        count = self.each
        for size in sizes:
            count *= size
        return count

    def norm(self) -> tuple[int, int]:
        """(kept by an RMSNorm on the residual stream: its input, and 1 / rms; held for a moment by its backward)."""
        rows, width = self.outside, self.model.d_model
        spike = 2 * self.numbers(rows, width) if self.cuda else 4 * _WIDE * rows * width
        return self.numbers(rows, width) + _WIDE * rows, spike


def blocks_of(sizes: Sizes, held: Held, decoder: bool) -> list[Block]:
    """First the embedding, then the blocks, last the output with the loss."""
    model = sizes.model
    found = [Block((_embedding(sizes, held),))]
    by_kind: dict[tuple[bool, float | None], tuple[Stage, ...]] = {}
    number = 0
    for layer in range(model.num_layers):
        sparse, factor = is_moe_layer(model, layer), None
        if sparse:
            factor, number = _factor(model.moe, number), number + 1
        if (sparse, factor) not in by_kind:
            by_kind[sparse, factor] = tuple(_block(sizes, held, layer, sparse, factor))
        stages = tuple(replace(stage, name=f"block {layer}, {stage.name}") for stage in by_kind[sparse, factor])
        again = None
        if model.recompute == "block" and decoder:
            again = sizes.numbers(sizes.outside, model.d_model) + _replay(sizes, sparse)
        found.append(Block(stages, again))
    return [*found, Block((_output(sizes, held) if decoder else _head(sizes, held),))]


def _factor(moe: MoEConfig, index: int) -> float | None:
    """The largest that is ever in force in this MoE layer; None: no limit."""
    factors = [moe.capacity_factor, *moe.capacity_schedule.values()]
    of_layer = [factor[index] if isinstance(factor, list) else factor for factor in factors]
    return None if None in of_layer else max(factor for factor in of_layer if factor is not None)


def _replay(sizes: Sizes, sparse: bool) -> int:
    """Choices, and who was let in, of a block that is recomputed."""
    moe = [sizes.model.moe] if sparse else []
    moe += [sizes.model.attention.moe] if sizes.model.attention.kind == "switch" else []
    return sum(sizes.routed * _choices(each) * (_INDEX + 1) for each in moe)


def _choices(moe: MoEConfig) -> int:
    """K"""
    return moe.num_experts if moe.router == "expert_choice" else moe.top_k


def _block(sizes: Sizes, held: Held, layer: int, sparse: bool, factor: float | None) -> Iterator[Stage]:
    of_attention = held.within(f"{BLOCKS}{layer}.attention.", f"{BLOCKS}{layer}.attention_norm.")
    of_rest = held.within(f"{BLOCKS}{layer}.feed_forward.", f"{BLOCKS}{layer}.feed_forward_norm.")
    attention = _switch if sizes.model.attention.kind == "switch" else _attention
    yield replace(attention(sizes), elements=of_attention)
    if sparse:
        experts, combine = _experts(sizes, factor)
        yield replace(experts, elements=of_rest)
        yield combine
    else:
        yield replace(_feed_forward(sizes, sizes.model.d_ff, "feed-forward"), elements=of_rest)


def _embedding(sizes: Sizes, held: Held) -> Stage:
    """Ids, targets and marks of the tokens, and the table of positions; a tied matrix gets its second gradient."""
    model = sizes.model
    kept = sizes.tokens * 3 * _INDEX + sizes.routed * _MARKS * _INDEX
    if model.attention.position == "rotary":
        kept += 2 * _WIDE * sizes.seq_len * (model.head_width // 2)
    matrix = sizes.numbers(model.vocab_size // sizes.layout.tp, model.d_model)
    tied = model.tie_embeddings and not held.within("output.weight")
    return Stage(
        "embedding",
        kept,
        spike=2 * matrix if tied else 0,
        elements=held.within("positions") + (0 if tied else held.within("embedding.")),
    )


def _output(sizes: Sizes, held: Held) -> Stage:
    """The final norm, and the loss, which makes its gradients in the forward pass, chunk by chunk (parallel/loss.py)."""
    model, low = sizes.model, sizes.each < _WIDE
    vocabulary = model.vocab_size // sizes.layout.tp
    norm, _ = sizes.norm()
    grad_x, grad_w = sizes.numbers(sizes.tokens, model.d_model), _WIDE * vocabulary * model.d_model
    chunk = min(chunk_tokens(vocabulary), sizes.tokens) * vocabulary
    logits = chunk * (_WIDE + (sizes.each if low else 0))
    cast = sizes.numbers(vocabulary, model.d_model) if low else 0
    forward, backward = grad_x + logits + cast, grad_x + grad_w + cast
    return Stage(
        "loss",
        norm + grad_x + grad_w,
        spike=max(forward, backward),
        elements=held.within("output.") or held.within("embedding."),
        logits=logits if forward >= backward else 0,
    )


def _head(sizes: Sizes, held: Held) -> Stage:
    """The mean over tokens, in fp32."""
    wide = _WIDE * sizes.tokens * sizes.model.d_model
    return Stage("head", sizes.tokens + (wide if sizes.each < _WIDE else 0), spike=2 * wide, elements=held.within("head"))


def _attention(sizes: Sizes) -> Stage:
    """Norm, projections, rotation, attention. routed: about as much, with twice the keys and values near by."""
    model, tokens = sizes.model, sizes.tokens
    heads, width = len(sizes.heads.queries), model.head_width
    read = sizes.heads.kv_read * (2 if model.attention.kind == "routed" else 1)
    query, key = sizes.numbers(tokens, heads * width), sizes.numbers(tokens, read * width)
    norm, norm_spike = sizes.norm()
    kept = norm + sizes.numbers(tokens, model.d_model)  # its output, with all tokens, is what is projected
    rotated = model.attention.position == "rotary"
    # Queries; keys, of their own where they are rotated; values, in one memory with the keys that they came with.
    backend = model.attention.backend
    apart = backend == "torch" or (backend == "packed" and sizes.heads.kv_read > 1)
    kept += query + (key if rotated or apart else 0) + (key if apart else 2 * key)
    kept += _remembered(sizes, heads, read) + query  # ... and what comes out
    if rotated and sizes.each < _WIDE:
        kept += 4 * sizes.numbers(sizes.seq_len, width // 2)
    if model.attention.clip_qkv is not None:
        kept += query + 2 * key
    if model.attention.qk_ln:
        kept += 2 * _WIDE * tokens * heads * width + key
    spike = 2 * query + 2 * (2 * key) + _scores_spike(sizes, heads)
    return Stage("attention", kept, spike=sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))


def _remembered(sizes: Sizes, heads: int, read: int) -> int:
    """What a backend of attention keeps beside queries, keys, values and output."""
    attention, square = sizes.model.attention, sizes.seq_len * sizes.seq_len
    width, masked = sizes.model.head_width, 0
    if attention.position == "alibi" and attention.backend != "triton":
        masked = _WIDE * heads * square
    elif attention.window is not None and attention.backend != "triton":
        masked = sizes.each * square
    if attention.backend == "torch":
        repeated = 2 * sizes.numbers(sizes.tokens, (heads - read) * width) if heads > read else 0
        softmax = _WIDE + 1 + (sizes.each if sizes.each < _WIDE else _WIDE)  # scores, what is hidden, weights
        return repeated + sizes.batch * heads * square * softmax
    if attention.backend == "packed" and not masked and attention.dropout == 0 and not attention.sinks:
        rows = sum((stop - start) * stop for start, stop in blocks(sizes.seq_len, sizes.dtype))
        return sizes.numbers(sizes.batch * heads, rows)
    lse = _WIDE * sizes.tokens * heads
    if attention.dropout > 0 and attention.backend != "triton" and not sizes.cuda:
        return lse + masked + sizes.batch * heads * square * (2 * sizes.each + 1)
    return lse + masked


def _scores_spike(sizes: Sizes, heads: int) -> int:
    """Gradients of all weights at once, where attention is plain maths."""
    if sizes.model.attention.backend != "torch":
        return 0
    return 2 * _WIDE * sizes.batch * heads * sizes.seq_len * sizes.seq_len


def _feed_forward(sizes: Sizes, d_ff: int, name: str, norm: bool = True) -> Stage:
    """Dense: norm, gate and up, hidden."""
    model, tokens = sizes.model, sizes.tokens
    hidden = sizes.numbers(tokens, d_ff // sizes.layout.tp)
    of_norm, norm_spike = sizes.norm() if norm else (0, 0)
    kept = of_norm + sizes.numbers(tokens, model.d_model) + hidden * _hidden_kept(model.activation, True)
    spike = hidden * (3 if gated(model.activation) else 2) + sizes.numbers(tokens, model.d_model)
    return Stage(name, kept, spike=sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))


def _hidden_kept(activation: str, product: bool) -> int:
    """Tensors of hidden width that the activation and the product after it keep. product: by torch's autograd."""
    if not product:
        return 2 if gated(activation) else 1
    return {"relu": 1, "gelu": 2, "relu2": 2}.get(activation, 3)


def _rows(sizes: Sizes, moe: MoEConfig, factor: float | None, etp: int) -> Rows:
    model, layout = sizes.model, sizes.layout
    skew = one = 1.0
    if sizes.skewed:
        moe_layers = sum(is_moe_layer(model, layer) for layer in range(model.num_layers))
        skew = skew_of(moe, factor, layout.expert_ranks, layout.edp, 1 if model.recompute == "block" else moe_layers)
        one = skew_of_expert(moe, factor, layout.edp)
    return rows_of(moe, factor, sizes.routed, layout.expert_ranks, etp, skew, one)


def _router(sizes: Sizes, moe: MoEConfig) -> int:
    """Logits, probabilities, choices and weights."""
    tokens, chosen = sizes.routed, _choices(moe)
    kept = tokens * (2 * _WIDE * moe.num_experts + _WIDE + _INDEX + chosen * (_INDEX + _WIDE))
    if moe.renormalize and moe.top_k > 1:
        kept += tokens * _WIDE * (chosen + 2)
    if moe.router in ("sigmoid", "noisy"):
        kept += tokens * _WIDE * moe.num_experts * (1 if moe.router == "sigmoid" else 4)
    if sizes.each < _WIDE and moe.router != "hash":  # its input and its matrix in fp32
        kept += _WIDE * (tokens + moe.num_experts) * sizes.model.d_model
    return kept


def _experts(sizes: Sizes, factor: float | None) -> tuple[Stage, Stage]:
    """(norm, router, the way there and the experts; the way back with the weighted sum)."""
    model, layout, moe = sizes.model, sizes.layout, sizes.model.moe
    rows, width = _rows(sizes, moe, factor, layout.etp), model.d_model
    norm, norm_spike = sizes.norm()
    token = sizes.numbers(sizes.routed, width)
    kept, dispatch, back = norm + _router(sizes, moe), 0, 0
    # 1. The tokens that are routed: kept by the router in fp32, by the experts where nothing travels, by shared ones.
    local = moe.dispatch == "local"
    if layout.tp > 1 and not sizes.sequence_parallel:
        kept += token if local or sizes.each == _WIDE else 0
        kept += sizes.numbers(sizes.tokens, width) if moe.num_shared_experts else 0
    else:
        kept += token if local or moe.num_shared_experts or sizes.each == _WIDE else 0
    # 2. What travelled: rows that arrived, rows that came back, and the orders in which they lie.
    kept += rows.asked * (_INDEX + 1) + rows.sent * 2 * _INDEX
    arrived = rows.arrived
    if not local:
        arrived, dispatch, back = _travelled(sizes, rows)
        kept += arrived * (3 * _INDEX + 1)
    # 3. The experts.
    of_experts, spike = _expert_layers(sizes, rows, local)
    kept += of_experts
    shared = Stage("", 0)
    if moe.num_shared_experts:
        widths = expert_widths(moe, model.d_ff)
        shared = _feed_forward(sizes, moe.num_shared_experts * (sum(widths) // len(widths)), "shared", norm=False)
        kept += shared.kept - sizes.numbers(sizes.tokens, width)  # its input is counted above
    flow = sizes.numbers(sizes.outside, width)
    travelling = 0 if local else sizes.numbers(arrived, width)
    spike = flow + max(spike + travelling, norm_spike, shared.spike)
    combine = Stage("experts' results", 0, back, spike=flow + back)
    return Stage("experts", kept, dispatch, spike), combine


def _travelled(sizes: Sizes, rows: Rows) -> tuple[int, int, int]:
    """(rows that arrive, bytes of them that are kept, bytes of results that are kept at home)."""
    moe, width, ranks = sizes.model.moe, sizes.model.d_model, sizes.layout.expert_ranks
    if moe.dispatch == "all_gather":  # all tokens of the group, and the weights of their choices
        tokens = sizes.routed * ranks
        return tokens, sizes.numbers(tokens, width) + tokens * _choices(moe) * sizes.layout.etp * _WIDE, 0
    if moe.dispatch == "all_to_all" and moe.wire == "padded":
        # A block for each expert from each rank, as large as the fullest.
        experts = moe.num_experts * sizes.layout.etp
        local = experts // ranks
        padded = min(rows.asked, -(-rows.fullest // ranks)) * local * ranks
        return padded, sizes.numbers(padded, width), sizes.numbers(rows.sent, width)
    return rows.arrived, sizes.numbers(rows.arrived, width), sizes.numbers(rows.sent, width)


def _expert_layers(sizes: Sizes, rows: Rows, weighted: bool) -> tuple[int, int]:
    """(kept by the experts' matrices and activations, held for a moment by their backward pass). weighted: the sum over
    a token's experts is theirs too."""
    model, moe = sizes.model, sizes.model.moe
    widths = expert_widths(moe, model.d_ff)
    hidden = max(widths) // sizes.layout.etp if sizes.skewed else sum(widths) // len(widths) // sizes.layout.etp
    units, row = sizes.numbers(rows.arrived, hidden), sizes.numbers(rows.arrived, model.d_model)
    with_gate, fullest = gated(model.activation), rows.fullest
    local = moe.num_experts * sizes.layout.etp // sizes.layout.expert_ranks
    if moe.experts == "grouped_mm" and not sizes.cuda:  # kernels/grouped_mm/cpu.py
        one = sizes.numbers(fullest, hidden) * (4 if with_gate else 3) + 2 * sizes.numbers(fullest, model.d_model)
        rounded = sizes.numbers(local * ROUNDING // 2, hidden)
        return (units + rounded) * _hidden_kept(model.activation, False), one + row
    if moe.experts == "triton":
        again = 0 if model.recompute == "activation" else units
        return units * (2 if with_gate else 1) + again, units * (3 if with_gate else 2) + row
    kept = row + (row if weighted else 0)  # gathered, and what the sum weighs
    product = units
    if moe.experts == "bmm":
        padded = sizes.numbers(local * fullest, model.d_model)
        kept += (2 if with_gate else 1) * padded - row
        product = sizes.numbers(local * fullest, hidden)
    activated = _hidden_kept(model.activation, True) - 1
    kept += units * (2 if with_gate else 1) if model.recompute == "activation" else units * activated + product
    return kept, units * (4 if with_gate else 3) + 2 * row


def _switch(sizes: Sizes) -> Stage:
    """Attention experts: a row for each assignment, to the queries and back, and to the outputs and back."""
    model, moe = sizes.model, sizes.model.attention.moe
    heads = moe.top_k * model.num_heads // sizes.layout.tp
    rows = _rows(sizes, moe, _factor(moe, 0), 1)
    width, query = model.head_width, sizes.numbers(sizes.tokens, heads * model.head_width)
    wide = sizes.numbers(rows.arrived, model.num_heads * width)
    key = sizes.numbers(sizes.tokens, width)
    norm, norm_spike = sizes.norm()
    kept = norm + sizes.numbers(sizes.tokens, model.d_model) + _router(sizes, moe)
    kept += rows.asked * 2 * (3 * _INDEX + 1) + query + 3 * key + _remembered(sizes, heads, 1) + query
    kept += sizes.numbers(rows.arrived, model.d_model) * 2 + wide
    dispatch = 0
    if moe.dispatch != "local":
        dispatch = 2 * sizes.numbers(rows.sent, model.d_model) + wide
    spike = 3 * query + 2 * wide + _scores_spike(sizes, heads)
    return Stage("attention", kept, dispatch, sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))
