"""Routed attention with its heads cut over tp, against one process with all heads: outputs and every gradient."""

from dataclasses import replace

import torch
from torch import Tensor

from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.attention.routed import RoutedSelfAttention
from moe_dist.config.model import AttentionConfig, HeadSizes, RoutedAttentionConfig
from moe_dist.parallel.collectives import own_slice
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize, logical_parameters
from tests.dist.helpers import run_checks
from tests.unit.helpers import context

B, S, D = 4, 10, 8
ROUTED = dict(num_routed_queries=2, num_routed_key_values=3, local_window=4)
CASES = [
    dict(kv_heads=1),
    dict(kv_heads=2),
    dict(kv_heads=4, average_routed=True),
    dict(kv_heads=1, causal_routing=False),
]


def layer_of(mesh: Mesh, kv_heads: int, **routed: object) -> RoutedSelfAttention:
    config = AttentionConfig(
        kind="routed", backend="torch", dropout=0.3, routed=RoutedAttentionConfig(**ROUTED, **routed)
    )
    layer = RoutedSelfAttention(HeadSizes(D, 4, kv_heads, 4), config, mesh, 1, "torch", 0.3)
    initialize(layer, seed=0)
    return layer.double()


def run(layer: RoutedSelfAttention, x_TD: Tensor, rows: int) -> Tensor:
    positions = Positions(rotary=tuple(t[None] for t in rotary_table(torch.arange(S).double(), 4, 100.0)))
    return layer(x_TD, (rows, S), positions, context())[0]


def check(mesh: Mesh, case: dict[str, object]) -> None:
    part, whole = layer_of(mesh, **case), layer_of(single_process_mesh(), **case)
    rows = B // mesh.dp.size
    mine = slice(mesh.dp.rank * rows * S, (mesh.dp.rank + 1) * rows * S)
    generator = torch.Generator().manual_seed(0)
    x_TD, pull_TD = torch.randn(2, B * S, D, generator=generator, dtype=torch.float64)
    cut = (lambda t: own_slice(t, mesh.tp)) if mesh.sequence_parallel else (lambda t: t)

    wanted_x = x_TD.clone().requires_grad_()
    expected = run(whole, wanted_x, B)
    # The other rows' gradients are other dp ranks'.
    expected[mine].backward(pull_TD[mine])
    x = cut(x_TD[mine]).clone().requires_grad_()
    y = run(part, x, rows)
    y.backward(cut(pull_TD[mine]))

    same = dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(y, cut(expected[mine]), **same)
    torch.testing.assert_close(x.grad, cut(wanted_x.grad[mine]), **same)
    logical = dict(whole.named_parameters())
    for name, param, spec in logical_parameters(part):
        wanted = logical[name].grad.flatten()[spec.flat_start : spec.flat_start + param.numel()]
        torch.testing.assert_close(param.grad.flatten(), wanted, **same, msg=lambda text, name=name: f"{name}: {text}")


def check_layouts() -> None:
    two, four = create_mesh(1, 2), create_mesh(1, 4)
    for index, case in enumerate(CASES):
        check(replace(two, sequence_parallel=index % 2 == 0), case)
    for sequence_parallel in (False, True):
        check(replace(four, sequence_parallel=sequence_parallel), CASES[1])


def test_on_four_ranks() -> None:
    run_checks(4, [check_layouts])
