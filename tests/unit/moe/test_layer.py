"""The MoE layer against Hugging Face's Mixtral block and the Switch formula, and where experts idle or overflow."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.models.block import moe_layer
from moe_dist.moe.gate import Replay
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from tests.unit.helpers import context, gradients, tiny_model

BACKENDS = ["loop", "bmm", "grouped_mm"]
D, WIDTH, E = 16, 24, 4


def layer_of(**changes: object) -> MoE:
    layer = moe_layer(tiny_model(**changes), layer=0, mesh=single_process_mesh(), out_std=WIDTH**-0.5)
    initialize(layer, seed=0)
    return layer


def tokens(count: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


def mixtral_block(layer: MoE) -> nn.Module:
    """Hugging Face's block with the layer's weights; its linear weights are stored [out, in]."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=D,
        intermediate_size=WIDTH,
        num_local_experts=E,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    block = mixtral.MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([layer.experts.w_gate, layer.experts.w_up], dim=1))
        block.experts.down_proj.copy_(layer.experts.w_out.transpose(1, 2))
    return block


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 10, 67])
def test_dropless_is_mixtral(backend: str, count: int) -> None:
    layer = layer_of(experts=backend)
    block, weight_TD = mixtral_block(layer), torch.randn(count, D)
    x_TD, other_TD = tokens(count).requires_grad_(), tokens(count).requires_grad_()
    y_TD, _ = layer(x_TD, context())
    expected_TD = block(other_TD[None])[0]
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-6)
    (y_TD * weight_TD).sum().backward()
    (expected_TD * weight_TD).sum().backward()
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_TD.grad, other_TD.grad, **close)
    torch.testing.assert_close(layer.router.weight.grad, block.gate.weight.grad, **close)
    in_grad = torch.cat([layer.experts.w_gate.grad, layer.experts.w_up.grad], dim=1)
    torch.testing.assert_close(in_grad, block.experts.gate_up_proj.grad, **close)
    torch.testing.assert_close(layer.experts.w_out.grad, block.experts.down_proj.grad.transpose(1, 2), **close)


ACTIVATIONS = {"gelu_tanh": partial(F.gelu, approximate="tanh")}
ACTIVATIONS |= {"relu": F.relu, "gelu": F.gelu, "relu2": lambda h: F.relu(h) ** 2, "swiglu": F.silu, "geglu": F.gelu}


def expert(layer: MoE, i: int, x: Tensor) -> Tensor:
    """E_i(x) from the definition, for a token or many."""
    act, held = ACTIVATIONS[layer.experts.activation], layer.experts
    if held.w_gate is None:
        return act(x @ held.w_up[i].t()) @ held.w_out[i]
    return (act(x @ held.w_gate[i].t()) * (x @ held.w_up[i].t())) @ held.w_out[i]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_top_1_is_the_switch_formula(activation: str, backend: str) -> None:
    """y = p_i(x) E_i(x) of the most probable expert i, token after token; with the gradient of p_i."""
    layer, x_TD = layer_of(top_k=1, activation=activation, experts=backend), tokens()
    y_TD, _ = layer(x_TD, context())
    expected = []
    for x_D in x_TD:
        probs_E = (layer.router.weight @ x_D).softmax(-1)
        i = int(probs_E.argmax())
        expected.append(probs_E[i] * expert(layer, i, x_D))
    torch.testing.assert_close(y_TD, torch.stack(expected))
    params, weight_TD = list(layer.parameters()), torch.randn_like(y_TD)
    found = torch.autograd.grad((y_TD * weight_TD).sum(), params)
    torch.testing.assert_close(found, torch.autograd.grad((torch.stack(expected) * weight_TD).sum(), params))
    assert found[0].abs().max() > 1e-3


def test_shared_experts_are_added() -> None:
    """Two shared experts of width F are one dense feed-forward of width 2 F that every token passes."""
    plain, shared = layer_of(), layer_of(num_shared_experts=2)
    assert shared.shared.up.weight.shape == (2 * WIDTH, D)
    x_TD = tokens()
    gate, up, down = (getattr(shared.shared, name).weight for name in ("gate", "up", "down"))
    dense_TD = (F.silu(x_TD @ gate.t()) * (x_TD @ up.t())) @ down
    torch.testing.assert_close(shared(x_TD, context())[0], plain(x_TD, context())[0] + dense_TD)


def test_shared_experts_of_another_width_behind_a_gate() -> None:
    """sigmoid(x w) F(x), as in Qwen2-MoE."""
    plain, gated = layer_of(), layer_of(num_shared_experts=1, shared_d_ff=40, shared_gate=True)
    assert gated.shared.up.weight.shape == (40, D) and gated.shared_gate.weight.shape == (1, D)
    x_TD = tokens()
    gate, up, down = (getattr(gated.shared, name).weight for name in ("gate", "up", "down"))
    dense_TD = (F.silu(x_TD @ gate.t()) * (x_TD @ up.t())) @ down
    open_T1 = torch.sigmoid(x_TD @ gated.shared_gate.weight.t())
    torch.testing.assert_close(gated(x_TD, context())[0], plain(x_TD, context())[0] + open_T1 * dense_TD)


def forced(layer: MoE, expert: int) -> MoE:
    """The router sends positive tokens to `expert`."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[expert] = 0.1
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("only", range(E))
def test_all_tokens_on_one_expert(backend: str, only: int) -> None:
    layer, x_TD = forced(layer_of(top_k=1, experts=backend), only), tokens().abs()
    y_TD, stats = layer(x_TD, context())
    assert stats.load_E.tolist() == [10 * (e == only) for e in range(E)]
    p_T1 = (x_TD @ layer.router.weight.t()).softmax(-1)[:, only, None]
    torch.testing.assert_close(y_TD, p_T1 * expert(layer, only, x_TD))
    y_TD.sum().backward()
    gradients(layer)
    for grad in (layer.experts.w_gate.grad, layer.experts.w_up.grad, layer.experts.w_out.grad):
        others = [e for e in range(E) if e != only]
        assert torch.equal(grad[others], torch.zeros_like(grad[others]))  # zero: neither missing nor NaN
        assert grad[only].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_at_all_still_gives_zero_gradients(backend: str) -> None:
    experts = layer_of(experts=backend).experts
    rows_RD = torch.zeros(0, D, requires_grad=True)
    nothing = torch.zeros(0, 1)
    out_RD = experts(rows_RD, None, RowOrder.of(nothing.long(), nothing.bool(), E))
    assert out_RD.shape == (0, D)
    out_RD.sum().backward()
    assert rows_RD.grad.shape == (0, D)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(experts).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflowing_tokens_get_zero_and_the_others_the_same(backend: str) -> None:
    """All 10 tokens want expert 2, which takes ceil(1 * 1 * 10 / 4) = 3."""
    x_TD = tokens().abs()
    whole, _ = forced(layer_of(top_k=1, experts=backend), 2)(x_TD, context())
    y_TD, stats = forced(layer_of(top_k=1, experts=backend, capacity_factor=1.0), 2)(x_TD, context())
    assert stats.kept_E.tolist() == [0, 0, 3, 0]
    torch.testing.assert_close(y_TD[:3], whole[:3])
    assert torch.equal(y_TD[3:], torch.zeros(7, D))


def test_backends_agree_in_bfloat16() -> None:
    x_TD = tokens(33).bfloat16()
    outputs = [layer_of(experts=backend).bfloat16()(x_TD, context())[0] for backend in BACKENDS]
    assert {y_TD.dtype for y_TD in outputs} == {torch.bfloat16}
    for y_TD in outputs[1:]:
        torch.testing.assert_close(y_TD, outputs[0])


def test_a_replay_repeats_the_decisions_with_todays_weights() -> None:
    layer, x_TD, replay = layer_of(top_k=1, capacity_factor=0.75), tokens(), Replay()

    def weights() -> Tensor:
        probs_TE = (x_TD @ layer.router.weight.t()).softmax(-1)
        return probs_TE.gather(1, replay.plan.experts_TK)

    before_TD, before = layer(x_TD, context(), replay)
    again_TD, _ = layer(x_TD, context(), replay)
    assert torch.equal(before_TD, again_TD)
    scaled_TD = before_TD / weights()
    with torch.no_grad():
        layer.router.weight.neg_()  # now every token would go elsewhere
    _, fresh = layer(x_TD, context())
    repeated_TD, repeated = layer(x_TD, context(), replay)
    torch.testing.assert_close(repeated_TD, scaled_TD * weights())
    assert repeated.load_E.tolist() == before.load_E.tolist() != fresh.load_E.tolist()
    assert repeated.kept_E.tolist() == before.kept_E.tolist()
