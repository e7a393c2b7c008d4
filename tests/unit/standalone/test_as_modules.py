"""What PyTorch expects of any module: recomputation, compilation, the device meta, state dicts of weights alone."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist import (
    Block,
    MixtureOfAutoregressiveAttention,
    MixtureOfExperts,
    MultiQueryAttention,
    SwitchClassifier,
    SwitchMultiQueryAttention,
    Transformer,
    TransformerBlock,
)
from moe_dist.standalone import one_operation
from tests.unit.pretended_cuda import on_host, pretended_cuda

D = 16
Make = Callable[..., nn.Module]
RANDOM = dict(expert_capacity_factor=0.5, drop_policy="random")
LAYERS: dict[str, Make] = {
    "experts": lambda **k: MixtureOfExperts(D, 24, 4, 2, 0.2, **RANDOM, jitter=0.3, seed=1, **k),
    "noisy experts": lambda **k: MixtureOfExperts(D, 24, 4, 2, 0.2, router="noisy", seed=1, **k),
    "switch attention": lambda **k: SwitchMultiQueryAttention(D, 2, 4, 0.2, 0.5, drop_policy="random", seed=1, **k),
    "attention": lambda **k: MultiQueryAttention(
        D, 2, "torch", attn_pdrop=0.2, qk_ln=True, sinks=True, seed=1, **(dict(device="cpu") | k)
    ),
    "block with experts": lambda **k: TransformerBlock(
        D, 2, 24, use_moe=True, num_experts=4, position="rotary", seed=1, **k
    ),
    "dense block": lambda **k: TransformerBlock(D, 2, 24, position="alibi", seed=1, **k),
    "attention block": lambda **k: Block(D, 2, 4, 0.2, 0.5, seed=1, **k),
    "routed attention": lambda **k: MixtureOfAutoregressiveAttention(
        D, 2, 2, 4, heads=2, dim_head=8, dropout=0.2, seed=1
    ),
}
MODELS: dict[str, Make] = {
    "transformer": lambda **k: Transformer(D, 2, 4, 2, 11, 0.1, 0.5, seed=1, **k),
    "classifier": lambda **k: SwitchClassifier(4, D, 24, 11, 0.2, num_heads=2, seed=1, **k),
}


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def batch() -> Tensor:
    return torch.randn(2, 12, D, generator=torch.Generator().manual_seed(3))


def gradients(layer: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
    """Output and gradients of two passes that are both waiting when the backward pass begins."""
    torch.manual_seed(5)
    x = batch().requires_grad_()
    y = first(run(layer, x)) + 2 * first(run(layer, x))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_pass_that_is_run_again_is_the_same_pass(name: str, reentrant: bool) -> None:
    plain, again = LAYERS[name](), LAYERS[name]()
    expected = gradients(plain, lambda layer, x: layer(x))
    x_only = lambda layer, x: checkpoint(lambda x: first(layer(x)), x, use_reentrant=reentrant)  # noqa: E731
    if reentrant:
        torch.manual_seed(5)
        x = batch().requires_grad_()
        y = x_only(again, x) + 2 * x_only(again, x)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad for p in again.parameters())]
    else:
        found = gradients(again, x_only)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for layer in (plain, again):
        for part in layer.modules():
            if isinstance(part, MixtureOfExperts | SwitchMultiQueryAttention):
                assert part.step == 2 and int(part.loads.since_balance[0].load_E.sum()) == 2 * 24 * 2


def test_a_pass_that_cannot_be_repeated_is_refused() -> None:
    layer = LAYERS["experts"]()
    y = checkpoint(layer, batch().requires_grad_(), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(ValueError, match=r"leave preserve_rng_state of torch\.utils\.checkpoint at True"):
        y.sum().backward()
    told = checkpoint(lambda x: layer(x, step=7), batch().requires_grad_(), use_reentrant=False)
    told.sum().backward()


@pytest.mark.parametrize("name", [name for name in LAYERS | MODELS if name != "routed attention"])
def test_made_on_meta_given_memory_and_reset_a_layer_is_what_it_was(name: str) -> None:
    make = (LAYERS | MODELS)[name]
    expected = make().state_dict()
    with torch.device("meta"):
        inside = make(**(dict(device=None) if name == "attention" else {}))
    for layer in (make(device="meta"), inside):
        assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
        layer.to_empty(device="cpu")
        for t in [*layer.parameters(), *layer.buffers()]:
            t.detach().fill_(5)
        layer.reset_parameters()
        found = layer.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("router", "of_router"), [("softmax", {}), ("sigmoid", {"bias_E": [0.0] * 4}), ("hash", {"names_E": [0, 1, 2, 3]})]
)
@pytest.mark.parametrize("kind", [MixtureOfExperts, SwitchMultiQueryAttention])
def test_a_router_that_was_given_memory_is_as_at_first(
    kind: type[nn.Module], router: str, of_router: dict[str, list[float]]
) -> None:
    """All experts open, no bias, experts by their own numbers: what no parameter says, and what was there before."""
    sizes = (D, 24, 4) if kind is MixtureOfExperts else (D, 2, 4)
    layer = kind(*sizes, router=router, seed=1, device="meta").to_empty(device="cpu")
    found = {name.rpartition(".")[2]: buffer for name, buffer in layer.named_buffers()}
    expected = {"open_E": [1.0] * 4, **of_router}
    assert found.keys() >= expected.keys()
    for buffer in found.values():
        buffer.fill_(7)
    layer.reset_parameters()
    assert {name: found[name].tolist() for name in expected} == expected


def test_a_layer_that_was_given_memory_still_knows_its_experts() -> None:
    layer = MixtureOfExperts(D, 24, 4, seed=1, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.add_experts(2) == [4, 5]


@pytest.mark.parametrize("name", ["experts", "switch attention"])
def test_a_state_dict_of_weights_alone_is_enough(name: str) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    first(layer(batch()))
    weights = {
        key: value for key, value in layer.state_dict().items() if isinstance(value, Tensor) and "extra" not in key
    }
    around = nn.Sequential(other)
    around.load_state_dict({f"0.{key}": value for key, value in weights.items()})
    assert (other.seed, other.step) == (1, 0)
    del weights[next(iter(weights))]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(weights)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "routed attention" else name for name in LAYERS]
)
def test_a_compiled_model_computes_what_it_did(name: str) -> None:
    """By the backend that traces forward and backward; what the layers ask the host stays out of the graphs."""
    plain, inside = LAYERS[name](), LAYERS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(nn.Sequential(nn.LayerNorm(D), inside), backend="aot_eager")
        expected = gradients(nn.Sequential(nn.LayerNorm(D), plain), lambda layer, x: layer(x))
        found = gradients(compiled, lambda layer, x: layer(x))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_in_a_model_compiled_by_inductor() -> None:
    model = nn.Sequential(nn.Linear(D, D), MixtureOfExperts(D, 24, 4, dropout=0.0, seed=1), nn.Linear(D, D))
    expected = gradients(model, lambda layer, x: layer(x))
    torch._dynamo.reset()
    found = gradients(torch.compile(model, fullgraph=True), lambda layer, x: layer(x))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class WithExperts(nn.Module):
    """Two blocks, whose auxiliary losses are part of the loss. again: they are run again in the backward pass."""

    def __init__(self, again: bool = False, **options: Any) -> None:
        super().__init__()
        options = dict(num_experts=4, dropout=0.2) | RANDOM | options
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.experts = nn.ModuleList(MixtureOfExperts(D, 24, seed=seed, **options) for seed in range(2))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for norm, experts in zip(self.norms, self.experts, strict=True):
            block = lambda x, n=norm, e=experts: e(n(x), True, token_ids=IDS)  # noqa: E731
            y, aux = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
            x, total = x + y, total + aux
        return x.float().square().mean() + total


IDS = torch.arange(24).view(2, 12)
GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hash": dict(router="hash", top_k=1),
    "sigmoid, shared": dict(router="sigmoid", num_shared_experts=1, shared_gate=True, out_bias=True),
    "experts choose": dict(router="expert_choice", drop_policy="position", experts="bmm"),
    "run again": dict(again=True),
}


def steps_of(model: nn.Module, inside: WithExperts, autocast: bool) -> list[Any]:
    """Two steps in training, one in evaluation: losses, gradients, counts."""
    found: list[Any] = []
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch() + step)
        loss.backward()
        found += [loss.detach(), *(experts.expert_counts for experts in inside.experts)]
    found += [None if param.grad is None else param.grad.clone() for param in inside.parameters()]
    inside.eval()
    with torch.no_grad():
        found.append(model(batch()))
    return found + [experts.step for experts in inside.experts]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_without_breaks_has_the_experts_as_one_operation(name: str) -> None:
    """Bits as without a graph: dropout, random drops, auxiliary losses, autocast, frozen parameters, counts."""
    plain, inside = WithExperts(**GRAPHS[name]), WithExperts(**GRAPHS[name])
    for model in (plain, inside):
        model.experts[1].moe.router.requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
    for autocast in (False, True):
        torch.manual_seed(4)
        expected = steps_of(plain.train(), plain, autocast)
        torch.manual_seed(4)
        found = steps_of(compiled.train(), inside, autocast)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs
    assert [experts.step for experts in inside.experts] == [4, 4]
    gc.collect()
    assert not one_operation._PASSES  # nothing is kept of passes that are over


def test_blocks_that_are_compiled_one_by_one_share_a_graph_and_copies_are_themselves() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [MixtureOfExperts(D, 24, 4, dropout=0.0, seed=seed) for seed in range(9)]  # more than may be recompiled
    layers.append(copy.deepcopy(layers[0]))
    layers[9].moe.experts.w_out.data.mul_(2)
    expected = [layer(batch(), step=0) for layer in layers]
    for layer in layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for layer, y in zip(layers, expected, strict=True):
        assert torch.equal(layer(batch(), step=0), y)
    torch.testing.assert_close(expected[9], 2 * expected[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", LAYERS | MODELS)
def test_moved_to_a_gpu_nothing_stays_on_the_host(name: str) -> None:
    """Made on the CPU, so with kernels that run there, and moved to a device that pretends to be a GPU."""
    plain, moved = (LAYERS | MODELS)[name](), (LAYERS | MODELS)[name]()
    x = batch() if name in LAYERS else torch.randint(1, 11, (2, 12), generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    expected = first(plain(x))
    expected.square().sum().backward()
    with pretended_cuda() as cuda:
        moved.to(cuda)
        torch.manual_seed(5)
        y = first(moved(x.to(cuda)))
        y.square().sum().backward()
        assert y.device == cuda
    torch.testing.assert_close(on_host(y.detach()), expected.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(moved.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(on_host(ours.grad), theirs.grad, rtol=1e-4, atol=1e-4)
