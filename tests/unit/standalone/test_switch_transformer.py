"""`Block` and `Transformer` from outside."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_dist
from moe_dist import Block, Transformer
from tests.unit.helpers import gradients, random_ids

V = 19


def transformer(**options: object) -> Transformer:
    settings = dict(d_model=12, num_heads=3, num_experts=4, num_layers=2, vocab_size=V, seed=0) | options
    return Transformer(**settings).double()


def test_the_snippet_of_the_document() -> None:
    vocab_size, d_model, num_heads, num_experts, num_layers = 1000, 64, 8, 4, 2
    model = moe_dist.Transformer(
        d_model=d_model, num_heads=num_heads, num_experts=num_experts, num_layers=num_layers, vocab_size=vocab_size
    )
    logits = model(torch.randint(0, vocab_size, (2, 16)))
    assert logits.shape == (2, 16, vocab_size)
    assert logits.logsumexp(-1).abs().min() > 1  # not log-probabilities


def test_a_block_is_the_sum_of_its_parts() -> None:
    block = Block(12, 3, 4, seed=0).double().eval()
    x_BSD = torch.randn(2, 5, 12, dtype=torch.float64)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    y_BSD = x_BSD + block.attention(normed(x_BSD, block.attention_norm.weight))
    hidden = F.gelu(normed(y_BSD, block.feed_forward_norm.weight) @ block.feed_forward.up.weight.T)
    torch.testing.assert_close(block(x_BSD), y_BSD + hidden @ block.feed_forward.down.weight)
    assert hidden.shape[-1] == 48


def test_causal_and_padded() -> None:
    """A prefix, and a padded batch whose padding is masked, give what the sequences give alone."""
    model, ids_BS = transformer().eval(), random_ids(2, 9, V)
    logits = model(ids_BS)
    torch.testing.assert_close(model(ids_BS[:, :4]), logits[:, :4])
    left, mask = torch.cat((torch.zeros(2, 3).long(), ids_BS), dim=1), torch.ones(2, 12)
    mask[:, :3] = 0
    shifted = model(left, mask)[:, 3:]
    torch.testing.assert_close(shifted, logits)  # rotary positions are relative
    assert not torch.allclose(model(left)[:, 3:], logits)


def test_the_auxiliary_loss_is_the_sum_of_the_layers() -> None:
    model, ids_BS = transformer(z_loss_coef=0.0, load_loss_coef=1.0), random_ids(2, 9, V)
    for training in (True, False):
        _, aux_loss = model.train(training)(ids_BS, return_aux_loss=True)
        assert 1.8 < float(aux_loss.detach()) < 8
    aux_loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if "router" in name}
    assert len(grads) == 2 and all(grad.abs().max() > 0 for grad in grads.values())


def test_it_learns() -> None:
    """Each id follows from the one before; all parameters have gradients."""
    model = transformer(capacity_factor=1.0).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        ids_BS = (random_ids(8, 1, V, seed=step) + 5 * torch.arange(13)) % V
        logits, aux_loss = model(ids_BS[:, :-1], return_aux_loss=True)
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BS[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        assert all(grad.abs().max() > 0 for grad in gradients(model).values())
        optimizer.step()
    assert float(loss.detach()) < 0.5


def test_layers_draw_different_weights_and_numbers() -> None:
    model = transformer(dropout=0.2)
    first, second = (block.attention for block in model.blocks)
    assert first.seed != second.seed
    assert not torch.equal(*(layer.attention.experts.w_query for layer in (first, second)))
    again = transformer(dropout=0.2)
    ids_BS = random_ids(2, 9, V)
    assert torch.equal(model(ids_BS), again(ids_BS))
    assert not torch.equal(transformer(seed=1)(ids_BS), again(ids_BS, step=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_layers=0), "num_layers=0 is below 1"),
        (dict(vocab_size=0), "vocab_size=0 is below 1"),
        (dict(d_ff=0), "d_ff=0 is below 1"),
        (dict(num_heads=5), "d_model=12 is not divisible by num_heads=5"),
    ],
)
def test_mistakes(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer(**options)


def test_mistakes_of_a_call() -> None:
    model = transformer()
    with pytest.raises(ValueError, match="x must be token ids"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="token ids 3 to 19 are outside 0 <= id < 19"):
        model(torch.tensor([[3, 19]]))
