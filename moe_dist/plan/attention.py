"""What autograd keeps of attention: of queries, keys and values on their way, and what its backend remembers.

| kept by            | what                                                                                         |
|--------------------|----------------------------------------------------------------------------------------------|
| projections        | their input, all tokens                                                                      |
| qk_norm = head     | queries and keys as they were projected, 1 / rms of each head                                |
| qk_norm = width    | the same in fp32, and before the scale                                                       |
| qk_ln              | queries without their mean in fp32, and before the scale; keys as they were projected        |
| clip_qkv           | what is clipped                                                                              |
| rotation           | nothing                                                                                      |
| attention          | queries, keys and values as it is given them, its result, and what its backend remembers     |

Keys and values are projected together and lie in one memory, of which both stay as long as one is needed as it was.
Biases keep nothing.
"""

from moe_dist.kernels.attention.packed import blocks
from moe_dist.plan.experts import largest_factor, routed_rows, router_kept
from moe_dist.plan.stages import INDEX, WIDE, Sizes, Stage


def attention_layer(sizes: Sizes, layer: int) -> Stage:
    """Of block number `layer`, with its norm."""
    return _switch(sizes, layer) if sizes.model.attention.kind == "switch" else _attention(sizes, layer)


def _attention(sizes: Sizes, layer: int) -> Stage:
    """Norm, projections, norms and rotation of heads, attention. routed: about as much, with twice the keys and values
    near by."""
    model, attention, tokens = sizes.model, sizes.model.attention, sizes.tokens
    heads, width = len(sizes.heads.queries), model.head_width
    read = sizes.heads.kv_read * (2 if attention.kind == "routed" else 1)
    query, key = sizes.numbers(tokens, heads * width), sizes.numbers(tokens, read * width)
    norm, norm_spike = sizes.norm()
    kept = norm + sizes.numbers(tokens, model.d_model)  # its output, with all tokens, is what is projected
    kept += _on_the_way(sizes, heads, read, layer) + _remembered(sizes, heads, read, layer)
    kept += query + _angles(sizes)  # what comes out
    spike = 2 * query + 2 * (2 * key) + _scores_spike(sizes, heads, layer)
    if attention.qk_ln or attention.qk_norm != "none":
        slim = attention.qk_norm == "head" and sizes.cuda
        spike = max(spike, (2 * query if slim else 4 * WIDE * tokens * heads * width) + 4 * key)
    spike = sizes.flow() + max(spike, norm_spike)
    return Stage("attention", kept, spike=spike, forward=_masks(sizes, query, key))


def _on_the_way(sizes: Sizes, heads: int, read: int, layer: int) -> int:
    """Queries, keys and values from their projections into attention."""
    model, attention, tokens = sizes.model, sizes.model.attention, sizes.tokens
    query, key = (sizes.numbers(tokens, count * model.head_width) for count in (heads, read))
    wide_query, wide_key = (WIDE * tokens * count * model.head_width for count in (heads, read))
    normed, clipped = attention.qk_ln or attention.qk_norm != "none", attention.clip_qkv is not None
    # Whether keys and values are copied, each into a memory of its own, before products.
    apart = _plain_maths(sizes) or (_packed(sizes, layer) and sizes.heads.kv_read > 1)
    new_keys = normed or clipped or apart or (attention.position == "rotary" and model.rotary_width > 0)
    kept = query * (1 + clipped) + key * (new_keys + (normed and clipped) + (clipped or apart))
    as_projected = not apart or clipped or (normed and (attention.qk_norm != "width" or sizes.each == WIDE))
    kept += 2 * key if as_projected else 0
    match "layer" if attention.qk_ln else attention.qk_norm:
        case "head":
            kept += query + WIDE * tokens * (heads + read) + (key if sizes.cuda else 0)  # whose kernel copies the keys
        case "width":
            kept += 2 * wide_query + wide_key * (1 if sizes.each == WIDE else 2)
        case "layer":
            kept += 2 * wide_query + 2 * WIDE * tokens * read
    return kept


def _angles(sizes: Sizes) -> int:
    """Those of the whole model, in the precision of queries and of keys, where that is not theirs."""
    if sizes.model.attention.position != "rotary" or sizes.each == WIDE:
        return 0
    return 4 * sizes.numbers(sizes.seq_len, sizes.model.rotary_width // 2)


def _window(sizes: Sizes, layer: int) -> int | None:
    """Of the layer, where it hides any key."""
    window = sizes.model.attention.window_of(layer)
    return None if window is None or window >= sizes.seq_len else window


def _packed(sizes: Sizes, layer: int) -> bool:
    """Whether the backend packed computes this layer: others than plain ones are flash's."""
    attention = sizes.model.attention
    hides = attention.position == "alibi" or _window(sizes, layer) is not None
    return attention.backend == "packed" and not hides and attention.dropout == 0 and not attention.sinks


def _remembered(sizes: Sizes, heads: int, read: int, layer: int) -> int:
    """What a backend of attention keeps beside queries, keys, values and output."""
    attention, square = sizes.model.attention, sizes.seq_len * sizes.seq_len
    width, masked = sizes.model.head_width, 0
    unmasked = attention.backend in ("triton", "flash_attn")  # their kernels ask where keys are
    if attention.position == "alibi" and not unmasked:
        masked = WIDE * heads * square
    elif _window(sizes, layer) is not None and not unmasked:
        masked = sizes.each * square
    if _plain_maths(sizes):
        repeated = 2 * sizes.numbers(sizes.tokens, (heads - read) * width) if heads > read else 0
        softmax = WIDE + 1 + (sizes.each if sizes.each < WIDE else WIDE)  # scores, what is hidden, weights
        if attention.backend == "torch":
            return repeated + sizes.batch * heads * square * softmax
        wide = 3 * (WIDE - sizes.each) * sizes.tokens * heads * width  # queries, keys and values in fp32
        return repeated + wide + sizes.batch * heads * square * WIDE
    if _packed(sizes, layer):
        rows = sum((stop - start) * stop for start, stop in blocks(sizes.seq_len, sizes.dtype))
        return sizes.numbers(sizes.batch * heads, rows)
    lse = WIDE * sizes.tokens * heads
    if attention.dropout > 0 and attention.backend != "triton" and not sizes.cuda:
        return lse + masked + sizes.batch * heads * square * (2 * sizes.each + 1)
    if attention.sinks and attention.backend != "triton":  # sinks are one more key of a mask of each head
        return lse + sizes.numbers(sizes.batch * heads * square)
    return lse + masked


def _plain_maths(sizes: Sizes) -> bool:
    """Whether all weights are made and kept: by `torch`, and on CPU by SDPA, whose kernel has no gradient for a mask,
    and so none for sinks."""
    attention = sizes.model.attention
    return attention.backend == "torch" or (attention.sinks and attention.backend != "triton" and not sizes.cuda)


def _scores_spike(sizes: Sizes, heads: int, layer: int) -> int:
    """Gradients of weights and scores: of all of them where attention is plain maths, whose weights have gone by then,
    of a block where it is packed, with its queries and their gradients."""
    if sizes.model.attention.backend == "torch":
        return WIDE * sizes.batch * heads * sizes.seq_len * sizes.seq_len
    if _packed(sizes, layer):
        start, stop = blocks(sizes.seq_len, sizes.dtype)[-1]
        rows = sizes.batch * heads * (stop - start)
        return sizes.numbers(rows, 2 * stop + 3 * sizes.model.head_width)
    return 0


def _masks(sizes: Sizes, query: int, key: int) -> int:
    """What sinks hold for a moment where they are one more key of a mask of each head: two masks, the scores, and
    queries, keys and values before they are scaled and longer by one. query, key: bytes of all of them."""
    attention, square = sizes.model.attention, sizes.seq_len * sizes.seq_len
    if not attention.sinks or attention.backend in ("torch", "triton"):
        return 0
    heads = len(sizes.heads.queries)
    return (2 if sizes.cuda else 3) * WIDE * sizes.batch * heads * square + query + 4 * key


def _switch(sizes: Sizes, layer: int) -> Stage:
    """Attention experts: a row for each assignment, to the queries and back, and to the outputs and back."""
    model, moe = sizes.model, sizes.model.attention.moe
    heads, read = len(sizes.heads.queries), sizes.heads.kv_read
    rows = routed_rows(sizes, moe, largest_factor(moe, layer), 1)
    width, query = model.head_width, sizes.numbers(sizes.tokens, heads * model.head_width)
    wide = sizes.numbers(rows.arrived, model.num_heads * width)
    key = sizes.numbers(sizes.tokens, read * width)
    norm, norm_spike = sizes.norm()
    kept = norm + sizes.numbers(sizes.tokens, model.d_model) + router_kept(sizes, moe)
    kept += rows.asked * 2 * (3 * INDEX + 1) + query + 3 * key + _remembered(sizes, heads, read, layer) + query
    kept += sizes.numbers(rows.arrived, model.d_model) * 2 + wide
    dispatch = 0
    if moe.dispatch != "local":
        dispatch = 2 * sizes.numbers(rows.sent, model.d_model) + wide
    spike = 3 * query + 2 * wide + _scores_spike(sizes, heads, layer)
    return Stage("attention", kept, dispatch, sizes.flow() + max(spike, norm_spike))
