"""What each tensor of a Hugging Face model is called here, and how it lies: one table, read in both directions.

| layout       | theirs                              | ours                                                        |
|--------------|-------------------------------------|-------------------------------------------------------------|
| SAME         | x                                   | x                                                           |
| TRANSPOSED   | x [out, in]                         | x [in, out]: of row-parallel layers, and out of experts     |
| KEY_VALUE    | k and v, each [G * P, ...]          | [G * 2 * P, ...]: P rows of keys, P of values, head by head |
| KEYS_OVER    | [2 * G * P, D]: k, then v           | the same                                                    |
| GATE_OVER_UP | [2 * F, D]                          | gate [F, D] and up [F, D]                                   |
| BY_TURNS     | [2 * F]: a gate, an up, a gate, ... | gate [F] and up [F]                                         |
| COLUMNS      | [D, 2 * F], columns by turns        | gate [F, D] and up [F, D]                                   |
| GROUPS       | [G * (H / G + 2) * P, ...]: of each | q [H * P, ...]; k and v as above                            |
|              | group its queries, its k, its v     |                                                             |

A name has {layer} and {expert} in it where there is one tensor for each. One that ends with [expert] is one tensor for
all experts, and the row is about a part of it: what belongs to that number in dimension 0. So whatever is read or
written at once is a tensor, or what it holds of one expert.

A row whose names on our side a model lacks (no norm of queries and keys, tied embeddings) is left out. Shapes are ours,
laid out as they have it.

Legend: D d_model, F hidden width, H query heads, G key/value heads, P width of a head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.model import HeadSizes

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Layout:
    """From their tensors of a row to ours, and back; both are told of the heads as well."""

    to_ours: Callable[[Tensors, HeadSizes], Tensors]
    to_theirs: Callable[[Tensors, HeadSizes], Tensors]


def _key_value(theirs: Tensors, heads: HeadSizes) -> Tensors:
    k, v = (t.unflatten(0, (-1, heads.head_dim)) for t in theirs)
    return [torch.stack((k, v), 1).flatten(0, 2)]


def _keys_and_values(ours: Tensors, heads: HeadSizes) -> Tensors:
    return [t.flatten(0, 1) for t in ours[0].unflatten(0, (-1, 2, heads.head_dim)).unbind(1)]


def _apart(theirs: Tensors, heads: HeadSizes) -> Tensors:
    by_group, groups = theirs[0].unflatten(0, (heads.num_kv_heads, -1)), heads.num_kv_heads
    q, kv = by_group.split([heads.width // groups, 2 * heads.head_dim], 1)
    return [q.flatten(0, 1), kv.flatten(0, 1)]


def _together(ours: Tensors, heads: HeadSizes) -> Tensors:
    return [torch.cat([t.unflatten(0, (heads.num_kv_heads, -1)) for t in ours], 1).flatten(0, 1)]


SAME = Layout(lambda theirs, heads: theirs, lambda ours, heads: ours)
TRANSPOSED = Layout(lambda theirs, heads: [t.t() for t in theirs], lambda ours, heads: [t.t() for t in ours])
KEY_VALUE = Layout(_key_value, _keys_and_values)
KEYS_OVER = Layout(
    lambda theirs, heads: _key_value(theirs[0].chunk(2), heads),
    lambda ours, heads: [torch.cat(list(_keys_and_values(ours, heads)))],
)
GATE_OVER_UP = Layout(lambda theirs, heads: theirs[0].chunk(2, 0), lambda ours, heads: [torch.cat(list(ours))])
BY_TURNS = Layout(
    lambda theirs, heads: [theirs[0][0::2], theirs[0][1::2]],
    lambda ours, heads: [torch.stack(list(ours), 1).flatten(0, 1)],
)
COLUMNS = Layout(
    lambda theirs, heads: [theirs[0][:, 0::2].t(), theirs[0][:, 1::2].t()],
    lambda ours, heads: [torch.stack(list(ours), 1).flatten(0, 1).t()],
)
GROUPS = Layout(_apart, _together)


@dataclass(frozen=True)
class Row:
    """Names on both sides, several of them apart by blanks."""

    theirs: str
    ours: str
    layout: Layout = SAME


_T, _B = "model.layers.{layer}.", "blocks.{layer}."
_A, _F = f"{_B}attention.", f"{_B}feed_forward."

_AROUND = (
    Row("model.embed_tokens.weight", "embedding.weight"),
    Row("model.norm.weight", "output.norm.weight"),
    Row("lm_head.weight", "output.weight"),
    Row(f"{_T}input_layernorm.weight", f"{_B}attention_norm.weight"),
    Row(f"{_T}post_attention_layernorm.weight", f"{_B}feed_forward_norm.weight"),
)
_ATTENTION = (
    Row(f"{_T}self_attn.q_proj.weight", f"{_A}query.weight"),
    Row(f"{_T}self_attn.q_proj.bias", f"{_A}query.bias"),
    Row(f"{_T}self_attn.k_proj.weight {_T}self_attn.v_proj.weight", f"{_A}key_value.weight", KEY_VALUE),
    Row(f"{_T}self_attn.k_proj.bias {_T}self_attn.v_proj.bias", f"{_A}key_value.bias", KEY_VALUE),
    Row(f"{_T}self_attn.o_proj.weight", f"{_A}out.weight", TRANSPOSED),
    Row(f"{_T}self_attn.o_proj.bias", f"{_A}out_bias.bias"),
    Row(f"{_T}self_attn.q_norm.weight", f"{_A}qk_norm.query_weight"),
    Row(f"{_T}self_attn.k_norm.weight", f"{_A}qk_norm.key_weight"),
    Row(f"{_T}self_attn.sinks", f"{_A}sinks_H"),
)


def _with_bias(theirs: str, ours: str, layout: Layout = SAME) -> tuple[Row, ...]:
    """A weight and its bias. theirs, ours: the beginning of their names."""
    weights, biases = (" ".join(f"{name}.{kind}" for name in ours.split()) for kind in ("weight", "bias"))
    return Row(f"{theirs}.weight", weights, layout), Row(f"{theirs}.bias", biases, layout)


def _out_with_bias(theirs: str, ours: str, bias: str) -> tuple[Row, ...]:
    """Of a row-parallel layer, whose bias is apart here."""
    return Row(f"{theirs}.weight", f"{ours}.weight", TRANSPOSED), Row(f"{theirs}.bias", f"{bias}.bias")


def _gated(theirs: str, ours: str) -> tuple[Row, ...]:
    """A feed-forward that every token passes through: dense, or the shared experts."""
    return (
        *_with_bias(f"{theirs}gate_proj", f"{ours}gate"),
        *_with_bias(f"{theirs}up_proj", f"{ours}up"),
        *_out_with_bias(f"{theirs}down_proj", f"{ours}down", f"{ours}out_bias"),
    )


def _each_expert(home: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Three matrices for each expert."""
    return (
        Row(f"{home}gate.weight", f"{_F}router.weight"),
        Row(f"{home}experts.{{expert}}.{gate}.weight", f"{_F}experts.w_gate[expert]"),
        Row(f"{home}experts.{{expert}}.{up}.weight", f"{_F}experts.w_up[expert]"),
        Row(f"{home}experts.{{expert}}.{down}.weight", f"{_F}experts.w_out[expert]", TRANSPOSED),
    )


def _linears(home: str) -> tuple[Row, ...]:
    """All experts in two tensors: [E, 2 * F, D] and [E, D, F]."""
    into, out = f"{home}input_linear.weight[expert]", f"{home}output_linear.weight[expert]"
    return (
        Row(f"{home}router.layer.weight", f"{_F}router.weight"),
        Row(into, f"{_F}experts.w_gate[expert] {_F}experts.w_up[expert]", GATE_OVER_UP),
        Row(out, f"{_F}experts.w_out[expert]", TRANSPOSED),
    )


LLAMA = _AROUND + _ATTENTION + _gated(f"{_T}mlp.", _F)
MIXTRAL = _AROUND + _ATTENTION + _each_expert(f"{_T}block_sparse_moe.", "w1", "w3", "w2")
QWEN_MOE = LLAMA + _each_expert(f"{_T}mlp.", "gate_proj", "up_proj", "down_proj")
QWEN2_MOE = (
    *QWEN_MOE,
    *_gated(f"{_T}mlp.shared_expert.", f"{_F}shared."),
    Row(f"{_T}mlp.shared_expert_gate.weight", f"{_F}shared_gate.weight"),
)
GLM4_MOE = (
    *QWEN_MOE,
    *_gated(f"{_T}mlp.shared_experts.", f"{_F}shared."),
    Row(f"{_T}mlp.gate.e_score_correction_bias", f"{_F}router.bias_E"),
)
GRANITE_MOE = _AROUND + _ATTENTION + _linears(f"{_T}block_sparse_moe.")
GPT_OSS = (
    *_AROUND,
    *_ATTENTION,
    Row(f"{_T}mlp.router.weight", f"{_F}router.weight"),
    Row(f"{_T}mlp.router.bias", f"{_F}router.logit_bias"),
    Row(f"{_T}mlp.experts.gate_up_proj[expert]", f"{_F}experts.w_gate[expert] {_F}experts.w_up[expert]", COLUMNS),
    Row(
        f"{_T}mlp.experts.gate_up_proj_bias[expert]",
        f"{_F}experts.b_gate[expert] {_F}experts.b_up[expert]",
        BY_TURNS,
    ),
    Row(f"{_T}mlp.experts.down_proj[expert]", f"{_F}experts.w_out[expert]"),
    Row(f"{_T}mlp.experts.down_proj_bias[expert]", f"{_F}experts.b_out[expert]"),
)
JETMOE = (
    *_AROUND,
    Row(f"{_T}self_attention.kv_proj.weight", f"{_A}key_value", KEYS_OVER),
    Row(f"{_T}self_attention.experts.router.layer.weight", f"{_A}router.weight"),
    Row(f"{_T}self_attention.experts.input_linear.weight[expert]", f"{_A}experts.w_query[expert]"),
    Row(f"{_T}self_attention.experts.output_linear.weight[expert]", f"{_A}experts.w_out[expert]", TRANSPOSED),
    Row(f"{_T}self_attention.experts.bias", f"{_A}out_bias.bias"),
    *_linears(f"{_T}mlp."),
    Row(f"{_T}mlp.bias", f"{_F}out_bias.bias"),
)

_H = "transformer.h.{layer}."
GPT_BIGCODE = (
    Row("transformer.wte.weight", "embedding.weight"),
    Row("transformer.wpe.weight", "positions.weight"),
    Row("lm_head.weight", "output.weight"),
    *_with_bias("transformer.ln_f", "output.norm"),
    *_with_bias(f"{_H}ln_1", f"{_B}attention_norm"),
    *_with_bias(f"{_H}ln_2", f"{_B}feed_forward_norm"),
    *_with_bias(f"{_H}attn.c_attn", f"{_A}query {_A}key_value", GROUPS),
    *_out_with_bias(f"{_H}attn.c_proj", f"{_A}out", f"{_A}out_bias"),
    *_with_bias(f"{_H}mlp.c_fc", f"{_F}up"),
    *_out_with_bias(f"{_H}mlp.c_proj", f"{_F}down", f"{_F}out_bias"),
)

FALCON = (
    Row("transformer.word_embeddings.weight", "embedding.weight"),
    Row("lm_head.weight", "output.weight"),
    *_with_bias("transformer.ln_f", "output.norm"),
    *_with_bias(f"{_H}self_attention.query_key_value", f"{_A}query {_A}key_value", GROUPS),
    *_out_with_bias(f"{_H}self_attention.dense", f"{_A}out", f"{_A}out_bias"),
    *_with_bias(f"{_H}mlp.dense_h_to_4h", f"{_F}up"),
    *_out_with_bias(f"{_H}mlp.dense_4h_to_h", f"{_F}down", f"{_F}out_bias"),
)
_ONE_NORM = _with_bias(f"{_H}input_layernorm", f"{_B}attention_norm")
FALCON_NORMS = {
    "sequential": (*_ONE_NORM, *_with_bias(f"{_H}post_attention_layernorm", f"{_B}feed_forward_norm")),
    "parallel": _ONE_NORM,
    "parallel_norms": (
        *_with_bias(f"{_H}ln_attn", f"{_B}attention_norm"),
        *_with_bias(f"{_H}ln_mlp", f"{_B}feed_forward_norm"),
    ),
}
"""By `model.block`."""


@dataclass(frozen=True)
class Place:
    """A tensor, or what it holds at `expert` in dimension 0."""

    name: str
    expert: int | None = None


@dataclass(frozen=True)
class Pair:
    """A row for one layer and one expert."""

    theirs: tuple[Place, ...]
    ours: tuple[Place, ...]
    layout: Layout


Shapes = Mapping[str, Sequence[int]]


def pairs(rows: Sequence[Row], shapes: Shapes, num_layers: int) -> list[Pair]:
    """The rows that a model with logical `shapes` of ours has. Raises ValueError for tensors of ours that no row has;
    buffers that say which experts are open are no tensors of a model."""
    found = [pair for row in rows for pair in _expanded(row, shapes, num_layers)]
    known = ours_of(found)
    left = [name for name in shapes if name not in known and not is_open(name)]
    if left:
        raise ValueError("\n".join(f"{name} has no counterpart in this family" for name in left))
    return found


def is_open(name: str) -> bool:
    """Whether this is a router's record of which experts are open."""
    return name.endswith(".open_E")


def ours_of(found: Sequence[Pair]) -> dict[str, list[tuple[Pair, int]]]:
    """Of each tensor of ours, the pairs that it is made of, end to end, and its place in each."""
    return _by_name(found, lambda pair: pair.ours)


def theirs_of(found: Sequence[Pair]) -> dict[str, list[tuple[Pair, int]]]:
    """The same of theirs."""
    return _by_name(found, lambda pair: pair.theirs)


def shapes_of_theirs(found: Sequence[Pair], shapes: Shapes, heads: HeadSizes) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for name, parts in theirs_of(found).items():
        pair, at = parts[0]
        units = [torch.empty(unit_shape(place, shapes), device="meta") for place in pair.ours]
        shape = tuple(pair.layout.to_theirs(units, heads)[at].shape)
        result[name] = shape if pair.theirs[at].expert is None else (len(parts), *shape)
    return result


def unit_shape(place: Place, shapes: Shapes) -> tuple[int, ...]:
    shape = tuple(shapes[place.name])
    return shape if place.expert is None else shape[1:]


def _by_name(found: Sequence[Pair], side: Callable[[Pair], Sequence[Place]]) -> dict[str, list[tuple[Pair, int]]]:
    result: dict[str, list[tuple[Pair, int]]] = {}
    for pair in found:
        for at, place in enumerate(side(pair)):
            result.setdefault(place.name, []).append((pair, at))
    return result


def _expanded(row: Row, shapes: Shapes, num_layers: int) -> Iterator[Pair]:
    for layer in range(num_layers) if "{layer}" in row.ours else [0]:
        names = [name.replace("{layer}", str(layer)) for name in row.ours.split()]
        own = [name.removesuffix("[expert]") for name in names]
        if not all(name in shapes for name in own):
            continue
        for expert in range(shapes[own[0]][0]) if names[0] != own[0] else [None]:

            def place(text: str, layer: int = layer, expert: int | None = expert) -> Place:
                name = text.replace("{layer}", str(layer)).replace("{expert}", str(expert))
                whole = name.removesuffix("[expert]")
                return Place(whole, None if whole == name else expert)

            theirs, ours = (tuple(map(place, side.split())) for side in (row.theirs, row.ours))
            yield Pair(theirs, ours, row.layout)
