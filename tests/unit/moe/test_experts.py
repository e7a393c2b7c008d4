"""The experts of one rank against the definition, row by row: every backend, activation, bias and width."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.models.block import moe_layer
from moe_dist.moe.experts import Experts, expert_widths
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize, logical_parameters
from tests.unit.helpers import gradients, tiny_model

D, E, X, K = 16, 4, 13, 2
BACKENDS = ["loop", "bmm", "grouped_mm"]
BEND = {"relu": F.relu, "gelu": F.gelu, "relu2": lambda h: F.relu(h) ** 2, "swiglu": F.silu, "geglu": F.gelu}


def experts_of(**changes: object) -> Experts:
    made = moe_layer(tiny_model(**changes), 0, single_process_mesh(), out_std=0.2).experts
    initialize(made, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, param in made.named_parameters():
        if name.startswith("b_"):
            param.data.normal_(generator=generator)
    return made


def assignments(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights, experts and which of them are kept; expert 3 is idle."""
    generator = torch.Generator().manual_seed(seed)
    x_XD = torch.randn(X, D, generator=generator)
    weights_XK = torch.rand(X, K, generator=generator)
    experts_XK = torch.randint(3, (X, K), generator=generator)
    return x_XD, weights_XK, experts_XK, torch.rand(X, K, generator=generator) < 0.8


def by_definition(held: Experts, x_XD: Tensor, weights_XK: Tensor, experts_XK: Tensor, kept_XK: Tensor) -> Tensor:
    unit = {  # one row or number a hidden unit, whatever the widths
        name: param.double() if name == "b_out" else param.double().reshape(-1, *[D][: name[0] == "w"])
        for name, param in held.named_parameters()
    }
    starts = [sum(held.widths[:e]) for e in range(E)]
    rows = []
    for x in range(X):
        y_D = torch.zeros(D, dtype=torch.float64)
        for k in range(K):
            if not kept_XK[x, k]:
                continue
            e = int(experts_XK[x, k])
            own = slice(starts[e], starts[e] + held.widths[e])
            up = unit["w_up"][own] @ x_XD[x].double() + (unit["b_up"][own] if "b_up" in unit else 0)
            bent = BEND[held.activation](up)
            if "w_gate" in unit:
                gate = unit["w_gate"][own] @ x_XD[x].double() + (unit["b_gate"][own] if "b_gate" in unit else 0)
                bent = BEND[held.activation](gate) * up
            out = bent @ unit["w_out"][own] + (unit["b_out"][e] if "b_out" in unit else 0)
            y_D = y_D + weights_XK[x, k].double() * out
        rows.append(y_D)
    return torch.stack(rows)


def compare(held: Experts) -> None:
    x_XD, weights_XK, experts_XK, kept_XK = assignments()
    order, grad_XD = RowOrder.of(experts_XK, kept_XK, E), torch.randn(X, D)
    x_XD.requires_grad_(), weights_XK.requires_grad_()
    y_XD = held(x_XD, weights_XK, order)
    (y_XD * grad_XD).sum().backward()
    found = gradients(held) | {"x": x_XD.grad, "weights": weights_XK.grad}
    held.zero_grad()
    x_XD.grad = weights_XK.grad = None
    expected_XD = by_definition(held, x_XD, weights_XK, experts_XK, kept_XK)
    (expected_XD * grad_XD.double()).sum().backward()
    expected = gradients(held) | {"x": x_XD.grad, "weights": weights_XK.grad}
    torch.testing.assert_close(y_XD, expected_XD.float(), rtol=1e-5, atol=1e-6)
    for name, grad in expected.items():
        describe = partial("{0}: {1}".format, name)
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5, msg=describe)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", BEND)
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_definition(backend: str, activation: str, bias: bool) -> None:
    compare(experts_of(experts=backend, activation=activation, expert_bias=bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_activations(backend: str) -> None:
    compare(experts_of(experts=backend, recompute="activation", expert_bias=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_different_widths(backend: str, activation: str, bias: bool) -> None:
    model = tiny_model(experts=backend, activation=activation, expert_bias=bias)
    model.moe.d_ff = [3, 24, 8, 1]
    assert expert_widths(model.moe, model.d_ff) == (3, 24, 8, 1)
    held = moe_layer(model, 0, single_process_mesh(), out_std=0.2).experts
    initialize(held, seed=0)
    assert held.w_up.shape == (36, D)
    compare(held)


def saved_bytes(held: Experts) -> int:
    """Of all tensors kept for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_XD, weights_XK, experts_XK, kept_XK = assignments()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held(x_XD.requires_grad_(), weights_XK, RowOrder.of(experts_XK, kept_XK, E))
    return sum(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_recomputing_saves(backend: str) -> None:
    """`activation` keeps no [R, F] activation; the fused loop on CPU never does."""
    rows = int(assignments()[3].sum())
    none, activation = (saved_bytes(experts_of(experts=backend, recompute=r)) for r in ("none", "activation"))
    if backend == "grouped_mm":
        assert activation == none
    else:
        assert none - activation >= rows * 24 * 4
    weights = 3 * E * 24 * D * 4
    assert activation <= weights + 4 * rows * (2 * 24 + 2 * D) * 2, "more is kept than input, rows and pre-activations"


def test_experts_start_alike_in_every_width_order() -> None:
    """An expert's initial values are its own, drawn by its number."""
    specs = {name: spec for name, _, spec in logical_parameters(experts_of(expert_bias=True))}
    assert specs["w_up"].entries == (24 * D,) * E and specs["w_up"].logical_shape == (E, 24, D)
    assert specs["b_up"].logical_shape == (E, 24) and specs["b_out"].logical_shape == (E, D)
    assert [name for name, spec in specs.items() if not spec.decay] == ["b_gate", "b_up", "b_out"]
    assert not experts_of(expert_bias=True).b_up.isnan().any()
