"""What autograd keeps of a micro-step from the forward to the backward pass, layer by layer, and what backward needs.

A stage is a part of the model whose kept tensors go when its backward pass is done. What each operation keeps is read
off the layers: a product its input, RMSNorm its input and 1 / rms, attention its queries, keys and values and what its
backend remembers of the weights, the gated activations their two inputs (kernels/activation.py), the CPU's and Triton's
experts no rows but those that arrived, a dispatcher the rows that came back. A tensor that two operations keep counts
once, with the one that comes first. tests/unit/plan/test_memory.py and tests/dist/test_memory.py compare with steps
that run.

Legend: B batch, S sequence, T = B * S tokens of a data-parallel rank, t of them that this rank routes, o outside
tensor-parallel regions, D d_model, M numbers of a token over this rank's query heads, P width of a head, G key/value
heads that they read, F hidden width on this rank, E experts, e experts held here, K experts of a token, V vocabulary on
this rank, a bytes of a number.
"""

from collections.abc import Iterator
from dataclasses import replace

from moe_dist.kernels.attention.packed import blocks
from moe_dist.models.block import is_moe_layer
from moe_dist.parallel.loss import chunk_tokens
from moe_dist.plan.experts import choices, feed_forward, largest_factor, routed_layer, routed_rows, router_kept
from moe_dist.plan.held import BLOCKS, Held
from moe_dist.plan.stages import INDEX, WIDE, Block, Sizes, Stage

_MARKS = 4  # by what drops are counted: marks of a token


def blocks_of(sizes: Sizes, held: Held, decoder: bool) -> list[Block]:
    """First the embedding, then the blocks, last the output with the loss."""
    model, tied = sizes.model, decoder and not held.within("output.weight")
    found = [Block((_embedding(sizes, held, tied),))]
    by_kind: dict[tuple[bool, float | None], tuple[Stage, ...]] = {}
    number = 0
    for layer in range(model.num_layers):
        sparse, factor = is_moe_layer(model, layer), None
        if sparse:
            factor, number = largest_factor(model.moe, number), number + 1
        if (sparse, factor) not in by_kind:
            by_kind[sparse, factor] = tuple(_block(sizes, held, layer, sparse, factor))
        stages = tuple(replace(stage, name=f"block {layer}, {stage.name}") for stage in by_kind[sparse, factor])
        again = None
        if model.recompute == "block" and decoder:
            again = sizes.numbers(sizes.outside, model.d_model) + _replay(sizes, sparse)
        found.append(Block(stages, again))
    return [*found, Block((_output(sizes, held, tied) if decoder else _head(sizes, held),))]


def _replay(sizes: Sizes, sparse: bool) -> int:
    """Choices, and who was let in, of a block that is recomputed."""
    moe = [sizes.model.moe] if sparse else []
    moe += [sizes.model.attention.moe] if sizes.model.attention.kind == "switch" else []
    return sum(sizes.routed * choices(each) * (INDEX + 1) for each in moe)


def _block(sizes: Sizes, held: Held, layer: int, sparse: bool, factor: float | None) -> Iterator[Stage]:
    of_attention = held.within(f"{BLOCKS}{layer}.attention.", f"{BLOCKS}{layer}.attention_norm.")
    of_rest = held.within(f"{BLOCKS}{layer}.feed_forward.", f"{BLOCKS}{layer}.feed_forward_norm.")
    attention = _switch if sizes.model.attention.kind == "switch" else _attention
    yield replace(attention(sizes), elements=of_attention)
    if sparse:
        outputs = held.within(f"{BLOCKS}{layer}.feed_forward.experts.w_out")
        yield from routed_layer(sizes, factor, of_rest, outputs)
    else:
        yield replace(feed_forward(sizes, sizes.model.d_ff, "feed-forward"), elements=of_rest)


def _embedding(sizes: Sizes, held: Held, tied: bool) -> Stage:
    """Ids, targets and marks of the tokens, and the table of positions; a tied matrix gets its second gradient."""
    model = sizes.model
    kept = sizes.tokens * 3 * INDEX + sizes.routed * _MARKS * INDEX
    if model.attention.position == "rotary":
        kept += 2 * WIDE * sizes.seq_len * (model.head_width // 2)
    matrix = sizes.numbers(model.vocab_size // sizes.layout.tp, model.d_model)
    return Stage(
        "embedding",
        kept,
        spike=2 * matrix if tied else 0,
        elements=held.within("positions") + (0 if tied else held.within("embedding.")),
    )


def _output(sizes: Sizes, held: Held, tied: bool) -> Stage:
    """The final norm, and the loss, which makes its gradients in the forward pass, by chunks (parallel/loss.py)."""
    model, low = sizes.model, sizes.each < WIDE
    vocabulary = model.vocab_size // sizes.layout.tp
    norm, _ = sizes.norm()
    grad_x, grad_w = sizes.numbers(sizes.tokens, model.d_model), WIDE * vocabulary * model.d_model
    chunk = min(chunk_tokens(vocabulary), sizes.tokens) * vocabulary
    logits = chunk * (WIDE + (sizes.each if low else 0))
    cast = sizes.numbers(vocabulary, model.d_model) if low else 0
    forward, backward = grad_x + logits + cast, grad_x + grad_w + cast
    return Stage(
        "loss",
        norm + grad_x + grad_w,
        spike=max(forward, backward),
        elements=held.within("output.") + (held.within("embedding.") if tied else 0),
        logits=logits if forward >= backward else 0,
    )


def _head(sizes: Sizes, held: Held) -> Stage:
    """The mean over tokens, in fp32."""
    wide = WIDE * sizes.tokens * sizes.model.d_model
    return Stage(
        "head", sizes.tokens + (wide if sizes.each < WIDE else 0), spike=2 * wide, elements=held.within("head")
    )


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
    if rotated and sizes.each < WIDE:
        kept += 4 * sizes.numbers(sizes.seq_len, width // 2)
    if model.attention.clip_qkv is not None:
        kept += query + 2 * key
    if model.attention.qk_ln:
        kept += 2 * WIDE * tokens * heads * width + key
    spike = 2 * query + 2 * (2 * key) + _scores_spike(sizes, heads)
    return Stage("attention", kept, spike=sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))


def _remembered(sizes: Sizes, heads: int, read: int) -> int:
    """What a backend of attention keeps beside queries, keys, values and output."""
    attention, square = sizes.model.attention, sizes.seq_len * sizes.seq_len
    width, masked = sizes.model.head_width, 0
    unmasked = attention.backend in ("triton", "flash_attn")  # their kernels ask where keys are
    if attention.position == "alibi" and not unmasked:
        masked = WIDE * heads * square
    elif attention.window is not None and not unmasked:
        masked = sizes.each * square
    if attention.backend == "torch":
        repeated = 2 * sizes.numbers(sizes.tokens, (heads - read) * width) if heads > read else 0
        softmax = WIDE + 1 + (sizes.each if sizes.each < WIDE else WIDE)  # scores, what is hidden, weights
        return repeated + sizes.batch * heads * square * softmax
    if attention.backend == "packed" and not masked and attention.dropout == 0 and not attention.sinks:
        rows = sum((stop - start) * stop for start, stop in blocks(sizes.seq_len, sizes.dtype))
        return sizes.numbers(sizes.batch * heads, rows)
    lse = WIDE * sizes.tokens * heads
    if attention.dropout > 0 and attention.backend != "triton" and not sizes.cuda:
        return lse + masked + sizes.batch * heads * square * (2 * sizes.each + 1)
    return lse + masked


def _scores_spike(sizes: Sizes, heads: int) -> int:
    """Gradients of all weights, where attention is plain maths; the weights themselves have gone by then."""
    if sizes.model.attention.backend != "torch":
        return 0
    return WIDE * sizes.batch * heads * sizes.seq_len * sizes.seq_len


def _switch(sizes: Sizes) -> Stage:
    """Attention experts: a row for each assignment, to the queries and back, and to the outputs and back."""
    model, moe = sizes.model, sizes.model.attention.moe
    heads = moe.top_k * model.num_heads // sizes.layout.tp
    rows = routed_rows(sizes, moe, largest_factor(moe, 0), 1)
    width, query = model.head_width, sizes.numbers(sizes.tokens, heads * model.head_width)
    wide = sizes.numbers(rows.arrived, model.num_heads * width)
    key = sizes.numbers(sizes.tokens, width)
    norm, norm_spike = sizes.norm()
    kept = norm + sizes.numbers(sizes.tokens, model.d_model) + router_kept(sizes, moe)
    kept += rows.asked * 2 * (3 * INDEX + 1) + query + 3 * key + _remembered(sizes, heads, 1) + query
    kept += sizes.numbers(rows.arrived, model.d_model) * 2 + wide
    dispatch = 0
    if moe.dispatch != "local":
        dispatch = 2 * sizes.numbers(rows.sent, model.d_model) + wide
    spike = 3 * query + 2 * wide + _scores_spike(sizes, heads)
    return Stage("attention", kept, dispatch, sizes.numbers(sizes.outside, model.d_model) + max(spike, norm_spike))
