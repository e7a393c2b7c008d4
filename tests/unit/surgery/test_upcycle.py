"""A dense layer or decoder, and the mixture made of it, compute the same to 1e-6."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.models.block import moe_layer
from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import Layout, mesh_without_processes, single_process_mesh
from moe_dist.parallel.sharding import initialize, logical_parameters
from moe_dist.surgery.layers import add_experts
from moe_dist.surgery.models import change_experts, upcycle_decoder
from moe_dist.surgery.upcycle import upcycle
from tests.unit.helpers import context, random_ids, tiny_model

D, WIDTH, T = 16, 24, 200
ROUTERS = [
    dict(),
    dict(top_k=3),
    dict(top_k=1),
    dict(top_k=1, num_experts=5),
    dict(renormalize=False),
    dict(num_experts=6, num_groups=3, top_k_groups=1),
    dict(router="sigmoid"),
    dict(router="sigmoid", top_k=1),
    dict(router="sigmoid", renormalize=False),
    dict(router="noisy"),
    dict(router="sinkhorn"),
    dict(router="sinkhorn", top_k=1),
    dict(router="hash"),
    dict(router="hash", top_k=1),
]


def dense_of(activation: str = "swiglu", std: float = WIDTH**-0.5) -> FeedForward:
    dense = FeedForward(D, WIDTH, activation, single_process_mesh(), std)
    initialize(dense, seed=1)
    return dense


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=dtype)


def run(layer: MoE, phase: str, x_TD: Tensor) -> tuple[Tensor, object]:
    return layer(x_TD, replace(context(phase=phase), token_ids_T=torch.arange(len(x_TD)) % 29))


@pytest.mark.parametrize("changes", ROUTERS, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_upcycled_layer_is_the_dense_layer(activation: str, changes: dict) -> None:
    """To 1e-6, in training and evaluation, and tokens are spread over experts from the start."""
    dense, x_TD = dense_of(activation), tokens()
    layer = upcycle(dense, tiny_model(activation=activation, expert_bias=True, **changes))
    for phase in ("train", "dropless"):
        y_TD, stats = run(layer, phase, x_TD)
        torch.testing.assert_close(y_TD, dense(x_TD), rtol=2e-6, atol=1e-6)
        assert stats.load_E.max() < 2.5 * T * layer.config.top_k / layer.config.num_experts, stats.load_E
        assert (stats.load_E > 0).all()


def test_routed_scale_and_experts() -> None:
    dense = dense_of()
    for changes, scale in (
        (dict(), 1.0),
        (dict(top_k=1), 4.0),
        (dict(renormalize=False), 2.0),
        (dict(router="sigmoid", top_k=1), 2.0),
    ):
        layer = upcycle(dense, tiny_model(**changes))
        assert layer.config.routed_scale == scale
        for expert in range(4):
            assert torch.equal(layer.experts.w_up[expert], dense.up.weight)
            assert torch.equal(layer.experts.w_out[expert], dense.down.weight)
        fresh = moe_layer(tiny_model(**changes), 0, single_process_mesh(), out_std=WIDTH**-0.5)
        specs = [(name, spec) for name, _, spec in logical_parameters(fresh)]
        assert [(name, spec) for name, _, spec in logical_parameters(layer)] == specs


def test_the_router_of_an_upcycled_layer_learns() -> None:
    for changes in (dict(), dict(top_k=1), dict(router="sigmoid", top_k=1)):
        layer = upcycle(dense_of(), tiny_model(**changes), noise=0.1)
        y_TD, stats = run(layer, "train", tokens())
        ((y_TD - 1).square().mean() + stats.aux_loss).backward()
        assert layer.router.weight.grad.abs().max() > 1e-4


def test_noise_makes_experts_differ_by_as_much() -> None:
    dense = dense_of()
    layer = upcycle(dense, tiny_model(), noise=0.1, seed=3)
    for held, matrix in ((layer.experts.w_up, dense.up.weight), (layer.experts.w_out, dense.down.weight)):
        for expert in range(4):
            away = (held[expert] - matrix).detach()
            assert 0.08 < float(away.std() / matrix.detach().std()) < 0.12
        assert not torch.equal(held[0], held[1])
    again = upcycle(dense, tiny_model(), noise=0.1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    assert (run(layer, "train", tokens())[0] - dense(tokens())).abs().max() > 1e-3


def test_what_cannot_be_upcycled() -> None:
    dense = dense_of()
    for changes, message in (
        (dict(num_experts=0), "num_experts=0"),
        (dict(routed_scale=2.0), "routed_scale=2.0"),
        (dict(num_shared_experts=1), "num_shared_experts=1"),
        (dict(router="expert_choice", capacity_factor=1.0), "router=expert_choice"),
        (dict(router="noisy", top_k=1), "router=noisy with top_k=1"),
        (dict(d_ff=32), "width \\[32\\] cannot be copies of a dense layer of d_ff=24"),
        (dict(activation="gelu"), "activation=gelu, but the dense layer 16, swiglu"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle(dense, tiny_model(**changes))
    with pytest.raises(ValueError, match="ff_bias=true: upcycling copies matrices"):
        upcycle(FeedForward(D, WIDTH, "swiglu", single_process_mesh(), 0.1, bias=True), tiny_model())
    with pytest.raises(ValueError, match="tp=2"):
        upcycle(FeedForward(D, WIDTH, "swiglu", mesh_without_processes(Layout(2, tp=2), 0), 0.1), tiny_model())


def test_without_preserving_anything_goes() -> None:
    model = tiny_model(router="expert_choice", capacity_factor=1.0, routed_scale=2.0)
    layer = upcycle(dense_of(), model, preserve=False)
    assert layer.config.routed_scale == 2.0
    assert layer.router.weight.std() > 0.1
    run(layer, "train", tokens())


@pytest.mark.parametrize("changes", [dict(), dict(top_k=1), dict(router="sigmoid", top_k=1), dict(router="hash")],
    ids=str)  # fmt: skip
def test_an_upcycled_decoder_is_the_dense_decoder(changes: dict) -> None:
    dense = Decoder(tiny_model(num_experts=0, num_layers=4), single_process_mesh(), seed=5)
    ids = random_ids(3, 10)
    moe = replace(MoEConfig(num_experts=4, capacity_factor=None), **changes)
    for layers in (None, [1, 3], [0, 1, 2, 3], [3]):
        decoder = upcycle_decoder(dense, moe, layers)
        found = [i for i, block in enumerate(decoder.blocks) if isinstance(block.feed_forward, MoE)]
        assert found == (layers or [0, 1, 2, 3])
        assert decoder.config.moe.every == (1 if layers is None else layers[0] + 1)
        for phase in ("train", "dropless"):
            logits, expected = (m(ids, None, context(phase=phase), "logits") for m in (decoder, dense))
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        old = dict(dense.named_parameters())
        assert all(torch.equal(p, old[name]) for name, p in decoder.named_parameters() if name in old)
    assert "embedding.weight" in old and len(old) > 10
    assert dense.config.moe.num_experts == 0  # a new decoder was made


def test_decoders_that_cannot_be_upcycled() -> None:
    mesh = single_process_mesh()
    with pytest.raises(ValueError, match="has MoE layers of 4"):
        upcycle_decoder(Decoder(tiny_model(), mesh), MoEConfig())
    dense = Decoder(tiny_model(num_experts=0, num_layers=4), mesh)
    for layers in ([0, 2], [1], [], [4]):
        with pytest.raises(ValueError, match="every nth"):
            upcycle_decoder(dense, MoEConfig(), layers)


def test_changing_the_experts_of_a_whole_decoder() -> None:
    decoder, ids = Decoder(tiny_model(every=2, num_layers=4), single_process_mesh()), random_ids(2, 9)
    before = decoder(ids, ids, context())
    assert change_experts(decoder, lambda layer: add_experts(layer, 2)) == [[4, 5], [4, 5]]
    assert decoder.config.moe.num_experts == 6
    assert torch.equal(decoder(ids, ids, context()).loss, before.loss)
    again = Decoder(decoder.config, single_process_mesh(), seed=7)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(ids, ids, context()).loss, before.loss)
    with pytest.raises(ValueError, match="configs differ"):
        change_experts(decoder, lambda layer: add_experts(layer, 1) if layer.layer == 1 else None)
    with pytest.raises(ValueError, match="no MoE layer"):
        change_experts(Decoder(tiny_model(num_experts=0), single_process_mesh()), lambda layer: None)
