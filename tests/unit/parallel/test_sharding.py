"""A rank's initial parameters are its ranges of one logical model, whatever the layout."""

import pytest
import torch
from torch import nn

from moe_dist.kernels.random import RandomKey
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import Layout, mesh_without_processes, single_process_mesh
from moe_dist.parallel.sharding import ParamSpec, initialize, logical_parameters, parameter
from tests.unit.helpers import tiny_model


def holding(name: str, shape: tuple[int, ...], spec: ParamSpec, seed: int = 0) -> torch.Tensor:
    module = nn.Module()
    module.register_parameter(name, parameter(shape, spec))
    initialize(module, seed)
    return module.get_parameter(name).detach()


def test_a_stacked_shard_is_a_slice() -> None:
    whole = holding("w", (6, 3, 4), ParamSpec((6, 3, 4), entries=(12,) * 6))
    shard = holding("w", (2, 3, 4), ParamSpec((6, 3, 4), "expert", 24, entries=(12,) * 6))
    assert torch.equal(shard, whole[2:4])
    assert all(not torch.equal(whole[i], whole[j]) for i in range(6) for j in range(i))


def test_a_shard_of_rows_is_a_slice() -> None:
    whole = holding("w", (6, 4), ParamSpec((6, 4)))
    shard = holding("w", (2, 4), ParamSpec((6, 4), "tensor", 16))
    assert torch.equal(shard, whole[4:])


def test_values_depend_on_seed_and_name() -> None:
    spec = ParamSpec((8, 8))
    assert torch.equal(holding("w", (8, 8), spec), holding("w", (8, 8), spec))
    assert not torch.equal(holding("w", (8, 8), spec), holding("v", (8, 8), spec))
    assert not torch.equal(holding("w", (8, 8), spec), holding("w", (8, 8), spec, seed=1))


def test_spread() -> None:
    weight = holding("w", (200, 200), ParamSpec((200, 200), std=0.5))
    assert abs(float(weight.std()) - 0.5) < 0.01
    assert abs(float(weight.mean())) < 0.015
    assert torch.equal(holding("g", (5,), ParamSpec((5,), std=None)), torch.ones(5))


def test_a_shard_may_cut_an_entry() -> None:
    """Expert tensor parallelism: half of the hidden units of each expert."""
    whole = holding("w", (6, 4, 3), ParamSpec((6, 4, 3), entries=(12,) * 6))
    shard = holding("w", (3, 2, 3), ParamSpec((6, 4, 3), "expert", 30, entries=(12,) * 6))
    assert torch.equal(shard.flatten(), whole.flatten()[30:48])


def test_decay() -> None:
    assert ParamSpec((4, 4)).decay
    assert not ParamSpec((4,)).decay
    assert not ParamSpec((4, 4), vector=True).decay


def test_keys_that_share_their_low_32_bits_draw_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`initialize` hands a key of 63 bits to manual_seed. Keys that agree in 32 of them make identical experts."""
    keys = iter((RandomKey(5), RandomKey(5 + (1 << 32))))
    monkeypatch.setattr(RandomKey, "fold", lambda self, *parts: next(keys))
    experts = holding("w", (2, 3, 4), ParamSpec((2, 3, 4), entries=(12,) * 2))
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (4, 4)])
def test_every_rank_of_a_decoder_starts_from_the_same_logical_model(ep: int, tp: int) -> None:
    model = tiny_model(num_shared_experts=1, tie_embeddings=False, every=2, dispatch="all_to_all")
    whole = dict(Decoder(model, single_process_mesh(), seed=3).named_parameters())
    filled = {name: torch.zeros(param.numel()) for name, param in whole.items()}
    layout = Layout(4, ep, tp)
    for rank in range(4):
        part = Decoder(model, mesh_without_processes(layout, rank), seed=3)
        assert [name for name, _, _ in logical_parameters(part)] == list(whole)
        for name, param, spec in logical_parameters(part):
            assert spec.logical_shape == whole[name].shape
            here = slice(spec.flat_start, spec.flat_start + param.numel())
            assert torch.equal(param.flatten(), whole[name].flatten()[here]), name
            filled[name][here] = 1
    assert [name for name, mask in filled.items() if not mask.all()] == []
