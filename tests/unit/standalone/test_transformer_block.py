"""`TransformerBlock` against plain maths, and in pieces against the whole."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist import KVCache, TransformerBlock

D, H, S = 16, 4, 11


def block_of(**options: object) -> TransformerBlock:
    options = dict(dropout=0.0, seed=3) | options
    return TransformerBlock(D, H, 24, **options)


def by_hand(block: TransformerBlock, x_BSD: Tensor) -> Tensor:
    """Multi-head attention and a feed-forward, as the textbook has them; no positions."""
    attention, feed = block.attention, block.feed_forward
    normed = F.layer_norm(x_BSD, (D,), block.attention_norm.weight, block.attention_norm.bias)
    q = (normed @ attention.query.weight.t()).unflatten(-1, (H, -1)).transpose(1, 2)
    kv = (normed @ attention.key_value.weight.t()).unflatten(-1, (H, 2, -1))
    k, v = kv[..., 0, :].transpose(1, 2), kv[..., 1, :].transpose(1, 2)
    scores = q @ k.mT / (D // H) ** 0.5
    future = torch.ones(x_BSD.shape[1], x_BSD.shape[1]).triu(1).bool()
    heads = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    x_BSD = x_BSD + heads.transpose(1, 2).flatten(2) @ attention.out.weight
    normed = F.layer_norm(x_BSD, (D,), block.feed_forward_norm.weight, block.feed_forward_norm.bias)
    return x_BSD + F.gelu(normed @ feed.up.weight.t()) @ feed.down.weight


def test_is_a_pre_norm_block() -> None:
    block, x = block_of().double(), torch.randn(2, S, D, dtype=torch.float64)
    for norm in (block.attention_norm, block.feed_forward_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    y, cache, aux_loss = block(x)
    torch.testing.assert_close(y, by_hand(block, x))
    assert cache is None and aux_loss is None


def in_pieces(blocks: Sequence[TransformerBlock], x: Tensor, pieces: Sequence[int], position: bool) -> Tensor:
    caches, parts, start = [block.create_kv_cache(x.shape[0], x.shape[1]) for block in blocks], [], 0
    for part in x.split(list(pieces), 1):
        given = start if position else None
        for block, cache in zip(blocks, caches, strict=True):
            part, _, _ = block(part, kv_cache=cache, use_cache=True, cache_position=given)
        parts.append(part)
        start += part.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pieces", [(1,) * S, (4, 1, 3, 2, 1), (S,)], ids=["one-by-one", "uneven", "whole"])
@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_pieces_are_the_whole(depth: int, use_moe: bool, position: str, pieces: tuple[int, ...]) -> None:
    blocks = [block_of(use_moe=use_moe, num_experts=4, position=position, seed=i).eval() for i in range(depth)]
    x = torch.randn(2, S, D)
    whole = x
    for block in blocks:
        whole, _, _ = block(whole)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(blocks, x, pieces, position=True), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(in_pieces(blocks, x, pieces, position=False), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_is_causal_and_keeps_samples_apart(seed: int, use_moe: bool) -> None:
    torch.manual_seed(seed)
    block = block_of(use_moe=use_moe, position="rotary", seed=seed).double().eval()
    x = torch.randn(3, S, D, dtype=torch.float64)
    at, other = int(torch.randint(S, ())), x.clone()
    other[0, at] += 1
    difference = (block(x)[0] - block(other)[0]).abs().amax(-1)
    assert (difference[0, :at] < 1e-12).all() and (difference[0, at:] > 1e-9).any()
    torch.testing.assert_close(block(x)[0][1:], block(other)[0][1:], rtol=0, atol=0)


def test_a_mask_hides_keys_in_each_of_its_shapes() -> None:
    block, x = block_of().double().eval(), torch.randn(2, S, D, dtype=torch.float64)
    seen = torch.rand(2, S) > 0.3
    seen[:, 0] = True
    expected = block(x, mask=seen)[0]
    pairs = seen[:, None].expand(-1, S, -1)
    for mask in (seen.int(), seen.float(), pairs, pairs[:, None], seen[:, None, None]):
        torch.testing.assert_close(block(x, mask=mask)[0], expected)
    other = x.clone()
    other[~seen] += 1
    visible = seen  # what is hidden changes its own row alone
    torch.testing.assert_close(block(other, mask=seen)[0][visible], expected[visible])
    one = torch.ones(S, S, dtype=torch.bool).tril() & (torch.rand(S, S) > 0.3)
    torch.testing.assert_close(block(x, mask=one)[0], block(x, mask=one[None].expand(2, -1, -1))[0])


def test_a_row_that_sees_nothing_is_finite() -> None:
    block, x = block_of(), torch.randn(2, S, D, requires_grad=True)
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[1] = False
    y, _, _ = block(x, mask=mask)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    normed = F.layer_norm(x[1], (D,), block.feed_forward_norm.weight, block.feed_forward_norm.bias)
    torch.testing.assert_close(
        y[1], x[1] + F.gelu(normed @ block.feed_forward.up.weight.t()) @ block.feed_forward.down.weight
    )


def test_a_mask_with_a_cache_counts_the_past() -> None:
    block, x = block_of(position="rotary").eval(), torch.randn(2, S, D)
    mask = torch.rand(2, S) > 0.3
    whole = block(x, mask=mask)[0]
    cache = block.create_kv_cache(2, S)
    first = block(x[:, :6], mask=mask[:, :6], kv_cache=cache, use_cache=True)[0]
    rest = block(x[:, 6:], mask=mask, kv_cache=cache, use_cache=True)[0]
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_auxiliary_loss_comes_when_asked_for(training: bool) -> None:
    block, x = block_of(use_moe=True, num_experts=4).train(training), torch.randn(2, S, D)
    _, _, aux_loss = block(x, return_aux_loss=True)
    assert aux_loss.item() > 0
    aux_loss.backward()
    assert block.feed_forward.moe.router.weight.grad.abs().sum() > 0
    assert block_of()(x, return_aux_loss=True)[2].item() == 0


def test_the_capacity_factor_is_used() -> None:
    block, x = block_of(use_moe=True, num_experts=4, expert_capacity_factor=0.25), torch.randn(2, S, D)
    free = block_of(use_moe=True, num_experts=4, expert_capacity_factor=None)
    assert not torch.equal(block(x)[0], free(x)[0])
    torch.testing.assert_close(block.eval()(x)[0], free.eval()(x)[0])


def test_cache_follows_the_block() -> None:
    block = block_of().to(torch.bfloat16)
    cache = block.create_kv_cache(2, 8)
    assert cache.k_BGLP.dtype == torch.bfloat16
    assert block.create_kv_cache(2, 8, torch.float32).k_BGLP.dtype == torch.float32
    y, same, _ = block(torch.randn(2, 5, D, dtype=torch.bfloat16), kv_cache=cache, use_cache=True)
    assert y.dtype == torch.bfloat16 and same is cache and cache.cache_position == 5


def test_a_cache_made_by_hand_and_reused() -> None:
    block, x, cache = block_of().eval(), torch.randn(2, S, D), KVCache(4, S, H, D // H)
    first = block(x, kv_cache=cache, use_cache=True)[0]
    with pytest.raises(ValueError, match="max_seq_len=11"):
        block(x[:, :1], kv_cache=cache, use_cache=True)
    cache.reset()
    torch.testing.assert_close(block(x, kv_cache=cache, use_cache=True)[0], first)


def test_dropout_is_for_training() -> None:
    block, x = block_of(dropout=0.5), torch.randn(2, S, D)
    assert not torch.equal(block(x)[0], block(x)[0])
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])


@pytest.mark.parametrize(
    ("options", "call", "words"),
    [
        (dict(n_kv_heads=3), {}, "n_heads=4 is not divisible by n_kv_heads=3"),
        (dict(num_experts=4, router="softmax"), {}, "are of experts, but use_moe=False"),
        ({}, dict(use_cache=True), "needs a kv_cache"),
        ({}, dict(cache_position=0), "needs use_cache=True"),
        ({}, dict(mask=torch.ones(2, 5)), r"mask \[2, 5\] is none of"),
        ({}, dict(mask=torch.full((2, S), -1e9)), "not additive"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, object], call: dict[str, object], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        block_of(**options)(torch.randn(2, S, D), **call)


def test_a_mask_that_could_mean_two_things() -> None:
    with pytest.raises(ValueError, match="could be of 4 rows or of 4 queries"):
        block_of()(torch.randn(4, 4, D), mask=torch.ones(4, 4))


def test_activation_checkpointing_with_experts() -> None:
    block, x = block_of(use_moe=True, num_experts=4, dropout=0.3), torch.randn(2, S, D, requires_grad=True)
    torch.manual_seed(0)
    plain = block(x, step=7)[0]
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    torch.manual_seed(0)
    again = checkpoint(lambda x: block(x, step=7)[0], x, use_reentrant=False)
    (found,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_refused_call_keeps_the_cache() -> None:
    block, x = block_of().eval(), torch.randn(2, S, D)
    cache = block.create_kv_cache(2, S)
    block(x[:, :4], kv_cache=cache, use_cache=True)
    for options in (dict(mask=torch.ones(2, 3)), dict()):
        with pytest.raises(ValueError, match=r"mask|max_seq_len"):
            block(torch.randn(2, S + 1, D), kv_cache=cache, use_cache=True, cache_position=0, **options)
    assert cache.lengths == [4, 4]


@pytest.mark.parametrize("use_moe", [False, True])
def test_an_empty_batch(use_moe: bool) -> None:
    assert block_of(use_moe=use_moe, num_experts=4, position="rotary")(torch.randn(0, S, D))[0].shape == (0, S, D)
