"""Every element is saved by one rank, and all ranks save nearly as many: counted over layouts that nobody starts."""

import random
from itertools import product

import pytest
import torch

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.native import NativeEngine
from moe_dist.engine.shares import shares
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import Axis, Group, Layout, mesh_without_processes

AXES: tuple[Axis, ...] = ("world", "dp", "edp", "tp")  # that copies lie along: replicated, tensor, expert; under ZeRO


def group(layout: Layout, axis: Axis, rank: int) -> Group:
    found: Group = getattr(mesh_without_processes(layout, rank), axis)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_element_once_and_as_many_for_each(seed: int) -> None:
    """Pieces of random sizes, some empty, some larger than all others together, in random order of their axes."""
    dice = random.Random(seed)
    world = dice.choice([1, 2, 3, 4, 6, 8, 12])
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    layout = Layout(world, dice.choice(divisors), dice.choice(divisors))
    pieces = [
        (dice.choice([0, 1, dice.randrange(50), dice.randrange(3000)]), dice.choice(AXES))
        for _ in range(dice.randrange(1, 20))
    ]
    owned = [shares([(size, group(layout, axis, rank)) for size, axis in pieces]) for rank in range(world)]
    for number, (size, axis) in enumerate(pieces):
        for ranks in layout.groups(axis):
            together = [element for rank in ranks for element in owned[rank][number]]
            assert sorted(together) == list(range(size)), (layout, axis, size)
    totals = [sum(map(len, mine)) for mine in owned]
    assert max(totals) - min(totals) <= len(AXES), (layout, totals)


def test_by_hand() -> None:
    """Three ranks hold 5, 0 and 4 elements alike, so 3 for each; two more on every rank are its own."""
    expected = [
        [range(0, 3), range(0, 0), range(0, 0)],
        [range(3, 5), range(0, 0), range(0, 1)],
        [range(5, 5), range(0, 0), range(1, 4)],
    ]
    for rank, mine in enumerate(expected):
        alike = Group((4, 5, 6), rank)
        assert shares([(5, alike), (0, alike), (2, Group()), (4, alike)]) == [*mine[:2], range(2), mine[2]]


@pytest.mark.parametrize("widths", [(48, 48, 48, 48), (8, 24, 64, 96)])
@pytest.mark.parametrize(("ep", "tp"), product((1, 2, 4), (1, 2, 4)))
def test_a_model_in_every_layout(ep: int, tp: int, widths: tuple[int, ...]) -> None:
    """Eight ranks of a decoder with native engines, each of which is asked what it saves."""
    layout, wide = Layout(8, ep, tp), len(set(widths)) > 1
    moe = MoEConfig(num_experts=4, d_ff=list(widths) if wide else 48, router="sigmoid", bias_update_rate=0.1)
    model = ModelConfig(d_model=32, num_layers=2, num_heads=4, num_kv_heads=1, d_ff=48, moe=moe)
    model = resolve_backends(model, ep)
    counts: dict[str, torch.Tensor] = {}
    totals = []
    for rank in range(layout.world):
        here = mesh_without_processes(layout, rank)
        engine = NativeEngine(Decoder(model, here), here, EngineConfig(), OptimConfig(), 1)
        totals.append(0)
        for piece in engine.held("weight"):
            start, values = piece.owned_part()
            whole = counts.setdefault(piece.name, torch.zeros(piece.logical_shape))
            whole.view(-1)[start : start + values.numel()] += 1
            totals[-1] += values.numel()
    for name, times in counts.items():
        assert times.eq(1).all(), name
    buffers = sum(buffer.numel() for buffer in engine.model.buffers())
    if not wide:
        assert max(totals) - min(totals) <= 3 + buffers, totals
