"""What autograd keeps of a micro-step from the forward to the backward pass, layer by layer, and what backward needs.

A stage is a part of the model whose kept tensors go when its backward pass is done. What each operation keeps is read
off the layers: a product its input, a norm its input and 1 / rms, attention its queries, keys and values and what its
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

from moe_dist.parallel.loss import chunk_tokens
from moe_dist.plan.attention import attention_layer
from moe_dist.plan.experts import choices, feed_forward, largest_factor, routed_layer
from moe_dist.plan.held import BLOCKS, Held
from moe_dist.plan.stages import INDEX, WIDE, Block, Sizes, Stage

_MARKS = 4  # by what drops are counted: marks of a token


def blocks_of(sizes: Sizes, held: Held, decoder: bool) -> list[Block]:
    """First the embedding, then the blocks, last the output with the loss."""
    model, tied = sizes.model, decoder and not held.within("output.weight")
    found = [Block((_embedding(sizes, held, tied, decoder),))]
    by_kind: dict[tuple[object, ...], Block] = {}
    routed = model.moe.layers(model.num_layers)
    for layer in range(model.num_layers):
        sparse = layer in routed
        factor = largest_factor(model.moe, routed.index(layer)) if sparse else None
        kind = (sparse, factor, model.attention.window_of(layer), largest_factor(model.attention.moe, layer))
        if kind not in by_kind:
            stages, again = tuple(_block(sizes, held, layer, sparse, factor)), None
            if model.recompute == "block" and decoder:
                again = sizes.numbers(sizes.outside, model.d_model) + _replay(sizes, sparse)
            by_kind[kind] = Block(stages, again)
        found.append(Block(by_kind[kind].stages, by_kind[kind].again, layer))
    return [*found, Block((_output(sizes, held, tied) if decoder else _head(sizes, held),))]


def _replay(sizes: Sizes, sparse: bool) -> int:
    """Choices, and who was let in, of a block that is recomputed."""
    moe = [sizes.model.moe] if sparse else []
    moe += [sizes.model.attention.moe] if sizes.model.attention.kind == "switch" else []
    return sum(sizes.routed * choices(each) * (INDEX + 1) for each in moe)


def _block(sizes: Sizes, held: Held, layer: int, sparse: bool, factor: float | None) -> Iterator[Stage]:
    of_attention = held.within(f"{BLOCKS}{layer}.attention.", f"{BLOCKS}{layer}.attention_norm.")
    of_rest = held.within(f"{BLOCKS}{layer}.feed_forward.", f"{BLOCKS}{layer}.feed_forward_norm.")
    yield replace(attention_layer(sizes, layer), elements=of_attention)
    if sparse:
        outputs = held.within(f"{BLOCKS}{layer}.feed_forward.experts.w_out")
        of_shared = held.within(f"{BLOCKS}{layer}.feed_forward.shared")  # and the gate
        yield from routed_layer(sizes, factor, of_rest, outputs, of_shared)
    else:
        yield replace(feed_forward(sizes, sizes.model.d_ff, "feed-forward"), elements=of_rest)


def _embedding(sizes: Sizes, held: Held, tied: bool, decoder: bool) -> Stage:
    """Ids, targets and marks of the tokens, and the table of positions, or places of learned ones; a tied matrix gets
    its second gradient."""
    model = sizes.model
    kept = sizes.tokens * 3 * INDEX + sizes.routed * _MARKS * INDEX
    if model.attention.position == "rotary":
        kept += 2 * WIDE * sizes.seq_len * (model.rotary_width // 2)
    if model.attention.position == "learned" and decoder:
        kept += sizes.outside * INDEX
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
