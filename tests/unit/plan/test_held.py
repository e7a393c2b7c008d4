from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_dist.config import Config
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.freezing import freeze
from moe_dist.models.parameters import parameter_counts
from moe_dist.parallel.mesh import Layout, mesh_without_processes
from moe_dist.plan.held import Held
from tests.dist.helpers import tiny_config

# The model, and the layouts in which every rank is asked.
MODELS: list[tuple[dict[str, Any], list[Layout]]] = [
    ({}, [Layout(), Layout(4, ep=4, tp=2), Layout(4, ep=2, etp=2)]),
    ({"model__num_layers": 5, "model__moe__every": 2, "model__tie_embeddings": False}, [Layout(4, ep=2, tp=4)]),
    ({"model__moe__num_experts": 0}, [Layout(2, tp=2)]),
    ({"model__num_kv_heads": 2, "model__moe__num_shared_experts": 1}, [Layout(4, ep=2, tp=2), Layout(4, tp=4)]),
    ({"model__moe__d_ff": [16, 96, 32, 48]}, [Layout(4, ep=2), Layout(4, ep=2, etp=2), Layout(4, ep=4, tp=2)]),
    ({"model__moe__expert_bias": True, "model__activation": "gelu"}, [Layout(4, ep=2, tp=2)]),
    ({"model__moe__router": "noisy"}, [Layout(2, ep=2)]),
    ({"model__moe__router": "hash", "model__moe__capacity_factor": [1.0, None]}, [Layout(2, ep=2)]),
    ({"model__attention": {"kind": "switch"}}, [Layout(4, ep=2, tp=2)]),
    ({"model__attention": {"kind": "switch"}, "model__num_kv_heads": 2}, [Layout(4, ep=2, tp=2)]),
    ({"model__attention": {"kind": "routed"}}, [Layout(4, ep=2, tp=2)]),
    ({"model__attention": {"sinks": True, "qk_ln": True}}, [Layout(2, tp=2)]),
    ({"train__freeze": ["output.*", "blocks.*.experts.*"]}, [Layout(4, ep=2, tp=2)]),  # the embedding is tied
    (
        {
            "model__attention": {"qk_norm": "width", "qkv_bias": True, "out_bias": True, "window": [4, None]},
            "model__num_layers": 3,
            "model__moe": {"num_experts": 4, "first": 1, "num_shared_experts": 2, "shared_d_ff": 24}
            | {"shared_gate": True, "router_bias": True, "out_bias": True},
        },
        [Layout(4, ep=2, tp=2)],
    ),
    ({"model__attention": {"qk_norm": "head"}, "model__num_kv_heads": 2}, [Layout(4, tp=4)]),
    (
        {
            **{"model__norm": "layer", "model__block": "parallel", "model__ff_bias": True, "model__max_positions": 20},
            **{"model__attention": {"position": "learned"}, "model__moe": {"num_experts": 4, "first": 1}},
        },
        [Layout(4, ep=2, tp=2)],
    ),
    ({"task": "classification", "model__num_classes": 3}, [Layout(), Layout(4, ep=2, tp=2)]),
]


@pytest.mark.parametrize(("changes", "layouts"), MODELS)
def test_what_a_rank_would_hold_is_what_its_model_holds(changes: dict[str, Any], layouts: list[Layout]) -> None:
    """Tensor by tensor, name by name, against the whole model built for that rank."""
    config = tiny_config(**changes)
    for layout in layouts:
        model = resolve_backends(config.model, layout.expert_ranks)
        for rank in range(layout.world):
            mesh = mesh_without_processes(layout, rank)
            with torch.device("meta"):
                built = (
                    Classifier(model, mesh, config.train.seq_len)
                    if config.task == "classification"
                    else Decoder(model, mesh)
                )
            freeze(built, config.train.freeze)
            assert Held.of(config, layout, rank) == Held.by(built), (layout, rank)


def test_ranks_together_hold_each_expert_once() -> None:
    config, layout = Config(), Layout(4, ep=4, tp=2)
    held = [Held.of(config, layout, rank).expert for rank in range(4)]
    assert sum(held) == parameter_counts(resolve_backends(config.model, 4)).expert > 0


def test_groups_are_those_of_the_optimizer() -> None:
    held = Held.of(tiny_config(), Layout(2, ep=2))
    groups = held.groups()
    assert [expert for expert, _ in groups] == [False, True, False]  # norms are not decayed, and no expert has one
    assert sum(sum(sizes) for _, sizes in groups) == held.elements == held.dense + held.expert
    assert groups[2][1] == [32] * 5


def test_a_changed_configuration_is_another_question() -> None:
    config = tiny_config()
    before = Held.of(config, Layout()).elements
    config.model.d_ff = 64
    config.model.moe.d_ff = 64
    assert Held.of(config, Layout()).elements > before
    assert Held.of(replace(config, model=replace(config.model, num_layers=4)), Layout()).elements > 1.9 * before
