"""`SwitchMultiQueryAttention` from outside: masks, odd widths, lengths, losses, seeds and mistakes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist import SwitchMultiQueryAttention
from tests.unit.helpers import gradients

B, S, D, H = 3, 6, 12, 3
CLOSE = dict(rtol=1e-10, atol=1e-12)


def layer_of(**options: Any) -> SwitchMultiQueryAttention:
    settings = dict(d_model=D, num_heads=H, num_experts=4, seed=3) | options
    return SwitchMultiQueryAttention(**settings).double()


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def multi_query(layer: SwitchMultiQueryAttention, x_BSD: Tensor, seen_BHSS: Tensor) -> Tensor:
    """Attention of a single expert by plain maths; pairs of numbers turn as complex ones, an odd last one does not."""
    core, length = layer.attention, x_BSD.shape[1]
    width = core.head_dim
    half = width // 2
    angles = torch.arange(length)[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)

    def turned(x: Tensor) -> Tensor:  # [..., S, P]
        z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag, x[..., 2 * half :]), dim=-1)

    q_BHSP = turned((x_BSD @ core.experts.w_query[0].T).unflatten(-1, (-1, width)).transpose(1, 2))
    k_BSP, v_BSP = (x_BSD @ core.key_value.T).chunk(2, dim=-1)
    scores = q_BHSP @ turned(k_BSP)[:, None].mT / width**0.5
    seen = seen_BHSS & torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return (weights @ v_BSP[:, None]).transpose(1, 2).flatten(2) @ core.experts.w_out[0]


@pytest.mark.parametrize(("d_model", "heads"), [(12, 3), (15, 5), (10, 2), (3, 3)])
def test_one_expert_is_multi_query_attention(d_model: int, heads: int) -> None:
    """Odd head widths too, down to one."""
    layer = layer_of(d_model=d_model, num_heads=heads, num_experts=1, top_k=1)
    x_BSD, other_BSD = drawn(B, S, d_model).requires_grad_(), drawn(B, S, d_model).requires_grad_()
    y_BSD, expected_BSD = layer(x_BSD), multi_query(layer, other_BSD, torch.tensor(True))
    torch.testing.assert_close(y_BSD, expected_BSD, **CLOSE)
    names, params = zip(*((n, p) for n, p in layer.named_parameters() if "router" not in n), strict=True)
    ours = torch.autograd.grad(y_BSD.square().sum(), [x_BSD, *params])
    theirs = torch.autograd.grad(expected_BSD.square().sum(), [other_BSD, *params])
    for name, actual, expected in zip(("x", *names), ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE, msg=lambda text, name=name: f"{name} {text}")


MASKS = {
    "keys": (B, S),
    "pairs": (S, S),
    "pairs of a row": (B, S, S),
    "one row for all": (1, S, S),
    "pairs of a head": (B, H, S, S),
    "heads alike": (1, 1, S, S),
}


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_masks(shape: tuple[int, ...], kind: torch.dtype, dropout: float) -> None:
    """Zero is masked, beside the future; who sees nothing gets zero. By both backends."""
    layer = layer_of(num_experts=1, top_k=1, dropout=dropout).eval()
    mask = drawn(*shape, seed=5) > 0
    mask[..., 0] = False  # the first query sees nothing
    seen_BHSS = mask[:, None, None] if shape == (B, S) else mask.view((1,) * (4 - mask.dim()) + shape)
    seen_BHSS = mask[:, None] if mask.dim() == 3 else seen_BHSS
    x_BSD = drawn(B, S, D)
    y_BSD = layer(x_BSD, mask.to(kind))
    torch.testing.assert_close(y_BSD, multi_query(layer, x_BSD, seen_BHSS), **CLOSE)
    assert y_BSD[:, 0].abs().max() == 0
    y_BSD.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(layer).values())


def test_masks_with_experts() -> None:
    """A head's mask is that of the head in every expert; masked tokens are seen by nobody."""
    layer, x_BSD, mask_BS = layer_of().eval(), drawn(B, S, D), torch.ones(B, S)
    mask_BS[0, 2:4] = mask_BS[1, 5] = 0
    y_BSD = layer(x_BSD, mask_BS)
    changed_BSD = torch.where(mask_BS[..., None] == 0, drawn(B, S, D, seed=8), x_BSD)
    other_BSD = layer(changed_BSD, mask_BS)
    torch.testing.assert_close(y_BSD[mask_BS == 1], other_BSD[mask_BS == 1], **CLOSE)
    assert not torch.allclose(layer(x_BSD)[0, 4], y_BSD[0, 4])
    of_heads = mask_BS[:, None, None].expand(B, H, S, S)
    torch.testing.assert_close(layer(x_BSD, of_heads), y_BSD, **CLOSE)
    cut_HSS = torch.ones(1, H, S, S).tril(-1)  # one head does not see its own position, others do
    cut_HSS[:, 1:] = 1
    without = layer(x_BSD, cut_HSS)
    assert not torch.allclose(without, layer(x_BSD))


def test_any_length() -> None:
    layer = layer_of(capacity_factor=None)
    x_BSD = drawn(1, 1100, D)
    y_BSD = layer(x_BSD)
    assert y_BSD.shape == x_BSD.shape
    torch.testing.assert_close(layer(x_BSD[:, :3]), y_BSD[:, :3], **CLOSE)
    assert layer(x_BSD[:, :0]).shape == (1, 0, D)


def test_losses_come_in_training_and_in_evaluation() -> None:
    layer, x_BSD = layer_of(load_loss_coef=0.5, z_loss_coef=0.0), drawn(B, S, D)
    for training in (True, False):
        _, aux_loss = layer.train(training)(x_BSD, return_aux_loss=True)
        counts_E = layer.expert_counts.double()
        probs_E = (x_BSD.flatten(0, 1) @ layer.attention.router.weight.T).softmax(-1).mean(0)
        expected = 0.5 * 4 * (counts_E / counts_E.sum() * probs_E).sum()
        torch.testing.assert_close(aux_loss, expected, rtol=1e-6, atol=0)
    assert counts_E.sum() == B * S * 2


def test_capacity_counts_top_k() -> None:
    """ceil(1.0 * top_k * tokens / experts): a balanced load loses nothing; evaluation never does."""
    layer = layer_of(num_experts=2, top_k=2)
    x_BSD = drawn(B, S, D)
    torch.testing.assert_close(layer(x_BSD), layer.eval()(x_BSD), **CLOSE)
    half = layer_of(num_experts=2, top_k=2, capacity_factor=0.5)
    y_TD = half(x_BSD).flatten(0, 1)
    assert y_TD[: B * S // 2].abs().min() > 0 and y_TD[B * S // 2 :].abs().max() == 0


def test_dropout_is_a_function_of_seed_and_step() -> None:
    x_BSD, layer, same = drawn(B, S, D), layer_of(dropout=0.3), layer_of(dropout=0.3)
    first, second = layer(x_BSD), layer(x_BSD)
    assert torch.equal(first, same(x_BSD)) and not torch.equal(first, second)
    assert torch.equal(second, layer(x_BSD, step=1))
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same(x_BSD), layer(x_BSD))
    layer.eval()
    assert torch.equal(layer(x_BSD), layer(x_BSD))


def test_run_again_in_the_backward_pass() -> None:
    layer, x_BSD = layer_of(dropout=0.3), drawn(B, S, D).requires_grad_()
    layer(x_BSD, step=4).square().sum().backward()
    plain, x_BSD.grad = x_BSD.grad, None
    checkpoint(layer, x_BSD, step=4, use_reentrant=False, preserve_rng_state=False).square().sum().backward()
    assert torch.equal(plain, x_BSD.grad)
    with pytest.raises(ValueError, match="give forward the same `step` both times"):
        checkpoint(layer, x_BSD, use_reentrant=False, preserve_rng_state=False).sum().backward()


def test_routers_of_the_house() -> None:
    x_BSD = drawn(B, S, D)
    hashed = layer_of(router="hash")
    assert torch.equal(
        hashed(x_BSD, token_ids=torch.zeros(B, S).long(), step=0),
        hashed(x_BSD, token_ids=torch.zeros(B, S).long(), step=0),
    )
    assert sorted(hashed.expert_counts.tolist()) == [0, 0, B * S, B * S]
    sigmoid = layer_of(router="sigmoid", top_k=1, bias_update_rate=0.1)
    sigmoid(x_BSD)
    counts_E = sigmoid.expert_counts
    sigmoid.balance()
    assert torch.equal(sigmoid.attention.router.bias_E.sign(), (B * S / 4 - counts_E).sign().double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=5), "d_model=12 is not divisible by num_heads=5"),
        (dict(num_heads=0), "num_heads=0 is below 1"),
        (dict(num_experts=0), "num_experts=0 of attention is below 1"),
        (dict(top_k=5), "top_k=5 is larger than num_experts=4"),
        (dict(dropout=1.0), "dropout=1.0 is outside 0 <= dropout < 1"),
        (dict(capacity_factor=0.0), "capacity_factor=0.0 is not above 0"),
        (dict(router="expert_choice"), "router=expert_choice is not for attention experts"),
        (dict(experts="triton"), "experts=triton is of feed-forward experts"),
        (dict(seed=-1), "seed=-1 is outside"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_mistakes_of_a_call() -> None:
    layer = layer_of()
    with pytest.raises(TypeError, match="unknown options \\['d_ff'\\]"):
        layer_of(d_ff=3)
    with pytest.raises(ValueError, match="must be \\[batch, sequence, d_model=12\\]"):
        layer(drawn(S, D))
    for shape in ((B, S + 1), (S,), (B, S, S + 1), (1, 1, 1, S, S)):
        with pytest.raises(ValueError, match=r"mask \[.*\] is none of"):
            layer(drawn(B, S, D), torch.ones(shape))
    for shape in ((B + 1, S, S), (B, H + 1, S, S)):
        with pytest.raises(ValueError, match=r"mask \[.*\] is none of"):
            layer(drawn(B, S, D), torch.ones(shape))
