"""The whole layer with every Triton kernel, in the interpreter, against the same layer in plain torch."""

import pytest
import torch
from torch import Tensor

from moe_dist.models.block import moe_layer
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from tests.unit.helpers import context, gradients, random_ids, tiny_model

pytest.importorskip("triton")
TRITON = {"kernels": "triton", "experts": "triton"}
PLAIN = {"kernels": "torch", "experts": "grouped_mm"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outcome(router: str, **changes: object) -> dict[str, Tensor]:
    layer = moe_layer(tiny_model(DEVICE, router=router, **changes), 0, single_process_mesh())
    initialize(layer, seed=0)
    layer.to(DEVICE)
    x_TD = torch.randn(21, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    y_TD, stats = layer(x_TD, context())
    (y_TD.square().sum() + stats.aux_loss).backward()
    return gradients(layer) | {"x": x_TD.grad, "y": y_TD, "aux": stats.aux_loss, "load": stats.load_E.float()}


@pytest.mark.parametrize("experts", ["loop", "triton"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy", "expert_choice", "sinkhorn"])
def test_layer(router: str, experts: str) -> None:
    settings = {"capacity_factor": 0.75, "balance_scope": "sequence", "num_shared_experts": 1, "expert_bias": True}
    expected, found = (outcome(router, **settings | chosen) for chosen in (PLAIN, TRITON | {"experts": experts}))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("recompute", ["none", "activation", "block"])
def test_decoder(recompute: str) -> None:
    ids = random_ids(2, 12).to(DEVICE)
    losses, grads = [], []
    for changes in (PLAIN, TRITON):
        model = Decoder(
            tiny_model(DEVICE, capacity_factor=1.0, recompute=recompute, **changes), single_process_mesh()
        ).to(DEVICE)
        output = model(ids[:, :-1], ids[:, 1:], context())
        output.loss.backward()
        losses.append(output.loss.detach())
        grads.append(gradients(model))
    torch.testing.assert_close(*losses)
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
