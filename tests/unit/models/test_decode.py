"""With a cache, in pieces of any size, the model says what it says of the whole sequence."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import AttentionConfig
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids, tiny_model

S = 13
ATTENTIONS = {
    "rotary": AttentionConfig(backend="flash"),
    "plain": AttentionConfig(backend="torch"),
    "alibi": AttentionConfig(backend="flash", position="alibi"),
    "learned": AttentionConfig(backend="flash", position="learned"),
    "no-position": AttentionConfig(backend="flash", position="none"),
    "window": AttentionConfig(backend="flash", window=4),
    "windows": AttentionConfig(backend="torch", window=[4, None], sinks=True),
    "sinks": AttentionConfig(backend="torch", sinks=True, clip_qkv=0.7, qk_ln=True),
    "yarn": AttentionConfig(backend="flash", rope_scaling="yarn", rope_factor=4.0, rope_original_len=8),
    "llama3": AttentionConfig(
        backend="torch", rope_scaling="llama3", rope_factor=4.0, rope_original_len=8, rotary_share=0.5, qk_norm="head"
    ),
    "triton": AttentionConfig(backend="triton", position="alibi"),
}


def model_of(attention: AttentionConfig, **changes: object) -> Decoder:
    if attention.position == "learned":
        changes = {"max_positions": S, "norm": "layer"} | changes
    return Decoder(tiny_model(attention=attention, **changes), single_process_mesh()).eval()


def decoded(model: Decoder, ids_BS: Tensor, pieces: Sequence[int]) -> Tensor:
    """Logits [B, S, V], the sequence given in pieces."""
    caches = model.new_caches(*ids_BS.shape)
    with torch.no_grad():
        parts = [
            model(piece, None, context(phase="dropless"), "logits", caches) for piece in ids_BS.split(list(pieces), 1)
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pieces", [(1,) * S, (5, 1, 4, 2, 1), (S,)], ids=["one-by-one", "uneven", "whole"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_pieces_are_the_whole(attention: str, pieces: tuple[int, ...]) -> None:
    model, ids_BS = model_of(ATTENTIONS[attention]), random_ids(3, S)
    with torch.no_grad():
        whole = model(ids_BS, None, context(phase="dropless"), "logits")
    torch.testing.assert_close(decoded(model, ids_BS, pieces), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_layers", [2, 4])
@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_deep_dense_and_sparse(num_layers: int, num_experts: int, kv_heads: int) -> None:
    changes = dict(num_layers=num_layers, num_experts=num_experts, num_kv_heads=kv_heads, capacity_factor=1.0)
    model, ids_BS = model_of(ATTENTIONS["rotary"], **changes), random_ids(2, S)
    with torch.no_grad():
        whole = model(ids_BS, None, context(phase="dropless"), "logits")
    torch.testing.assert_close(decoded(model, ids_BS, (4, 1, 1, 6, 1)), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["rotary", "alibi", "learned", "window", "plain"])
def test_rows_of_different_lengths(attention: str) -> None:
    """Prompts padded on the right; the padding is forgotten, and each row goes on at its own place."""
    model, ids_BS, lengths = model_of(ATTENTIONS[attention]), random_ids(3, 9), [6, 2, 4]
    caches = model.new_caches(3, 9)
    padded_BS = ids_BS[:, :6].clone()
    for row, length in enumerate(lengths):
        padded_BS[row, length:] = 7
    last_B = torch.tensor(lengths) - 1
    with torch.no_grad():
        logits = model(padded_BS, None, context(phase="dropless"), "logits", caches, last_B)
        for cache in caches:
            cache.truncate(lengths)
        new_BS = torch.stack([ids_BS[row, n : n + 3] for row, n in enumerate(lengths)])
        after = model(new_BS, None, context(phase="dropless"), "logits", caches)
        for row, n in enumerate(lengths):
            whole = model(ids_BS[row : row + 1, : n + 3], None, context(phase="dropless"), "logits")[0]
            torch.testing.assert_close(logits[row], whole[n - 1], rtol=0, atol=1e-5)
            torch.testing.assert_close(after[row], whole[n:], rtol=0, atol=1e-5)


def test_a_full_cache_says_so() -> None:
    model = model_of(ATTENTIONS["rotary"])
    caches = model.new_caches(1, 4)
    model(random_ids(1, 4), None, context(phase="dropless"), "logits", caches)
    with pytest.raises(ValueError, match="max_seq_len=4"):
        model(random_ids(1, 1), None, context(phase="dropless"), "logits", caches)


def test_places_without_a_vector_are_refused() -> None:
    model = model_of(ATTENTIONS["learned"], max_positions=4)
    decoded(model, random_ids(1, 4), (3, 1))
    with pytest.raises(ValueError, match="5 tokens are more than max_positions=4: give the model at most"):
        model(random_ids(1, 5), None, context(phase="dropless"), "logits")
    caches = model.new_caches(1, 8)
    model(random_ids(1, 3), None, context(phase="dropless"), "logits", caches)
    with pytest.raises(ValueError, match="5 tokens are more than max_positions=4"):
        model(random_ids(1, 2), None, context(phase="dropless"), "logits", caches)


def test_the_cache_has_the_precision_of_the_weights() -> None:
    model = model_of(ATTENTIONS["rotary"]).bfloat16()
    caches = model.new_caches(1, 4)
    assert caches[0].k_BGLP.dtype == torch.bfloat16
    assert decoded(model, random_ids(1, 4), (3, 1)).dtype == torch.bfloat16
