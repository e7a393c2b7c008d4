"""Balancing by quantiles over ranks: every token counts once, in one reduction, and the bias goes on in any layout."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist import MixtureOfExperts, SwitchClassifier, Transformer
from moe_dist.checkpoint.reshard import load
from moe_dist.engine import base
from moe_dist.models.decoder import Decoder
from moe_dist.moe.balance import Tally
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.step import Site
from tests.dist.helpers import TinyRun, run_checks, tiny_config
from tests.dist.test_checkpoint import assert_same_state, save, state

QUANTILE: dict[str, Any] = {
    "model__moe__balance": "quantile",
    "model__attention__kind": "switch",
    "model__attention__moe": {"num_experts": 4, "router": "sigmoid", "balance": "loss+quantile"},
    "train__accumulation": 2,
}
ZERO3 = {"engine__name": "deepspeed", "engine__zero_stage": 3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "ep": {"parallel__ep": 2},
    "tp": {"parallel__tp": 2},
    "sp": {"parallel__tp": 2, "parallel__sequence_parallel": True, "model__recompute": "block"},
    "zero3": ZERO3 | {"parallel__ep": 2, "model__recompute": "block"},
    "zero3-tp": ZERO3 | {"parallel__tp": 2},
}
SITES = [Site(layer, kind) for layer in range(2) for kind in ("attention", "feed_forward")]
TOKENS = 8 * 16  # of a step


def start(changes: dict[str, Any]) -> TinyRun:
    config = tiny_config(**QUANTILE | changes)
    return TinyRun(config, create_mesh(config.parallel.ep, config.parallel.tp))


def told_in_a_step(run: TinyRun) -> tuple[dict[Site, Tally], int]:
    """What the routers are told after the first step, and in how many reductions of whole numbers it was summed."""
    told: dict[Site, Tally] = {}
    with (
        mock.patch.object(Decoder, "balance_routers", lambda model, tallies: told.update(tallies)),
        mock.patch.object(base, "all_reduce", side_effect=all_reduce) as reduce,
    ):
        run.forward_backward(0)
        run.engine.update(1e-3)
    return told, sum(call.args[0].dtype == torch.int64 for call in reduce.call_args_list)


def check_every_token_counts_once_in_one_reduction() -> None:
    """Also where scores are replicated, as over tp; the counts are those of any other layout, but for a score that is
    rounded over the edge of a bin."""
    first, _ = told_in_a_step(start(LAYOUTS["dp"]))
    for name, changes in LAYOUTS.items():
        told, reductions = told_in_a_step(start(changes))
        assert reductions == 1, (name, reductions)
        assert sorted(told, key=SITES.index) == SITES, name
        for site, tally in told.items():
            assert tally.needs_EB.sum(1).tolist() == [TOKENS] * 4, (name, site)
            assert int((tally.needs_EB - first[site].needs_EB).abs().sum()) <= 8, (name, site)
            assert torch.equal(tally.load_E, first[site].load_E), (name, site)


def biases(run: TinyRun) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in state(run)["weight"].items() if name.endswith("bias_E")}


def check_the_bias_resumes_in_any_layout(folder: str) -> None:
    for name, changes in LAYOUTS.items():
        run = start(changes)
        run.train(0, 3)
        path = save(Path(folder) / name, run.engine, 3)
        saved, expected = state(run), run.train(3, 5)
        assert len(biases(run)) == 4 and all(bias_E.abs().max() > 1e-3 for bias_E in biases(run).values())
        for other_name in (name, "tp", "zero3"):
            other = start(LAYOUTS[other_name] | {"train__seed": 1})
            load(path, other.engine)
            assert_same_state(state(other), saved)
            found = other.train(3, 5)
            assert abs(found[0] - expected[0]) < 1e-5, (name, other_name)
            assert found == expected or other_name != name


OPTIONS: list[dict[str, Any]] = [
    dict(balance="quantile", num_experts=8),
    dict(router="sigmoid", balance="quantile", num_experts=8, balance_ema=0.5),
    dict(router="sigmoid", balance="sign", num_experts=8, bias_update_rate=0.1),
]


def mixture(mesh: Mesh | None, options: dict[str, Any]) -> MixtureOfExperts:
    moe = dict(dropout=0.0, expert_capacity_factor=None) | options
    return MixtureOfExperts(8, 12, seed=1, mesh=mesh, **moe).double()


def draw(seed: int) -> Tensor:
    return torch.randn(48, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_the_layer_alone_over_a_mesh() -> None:
    for ep, tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        mesh = create_mesh(ep, tp)
        for options in OPTIONS:
            part, whole = mixture(mesh, options), mixture(single_process_mesh(), options)
            for step in range(2):
                part(draw(step).chunk(mesh.dp.size)[mesh.dp.rank])
                whole(draw(step))
            part.balance()
            whole.balance()
            assert torch.equal(part.moe.router.bias_E, whole.moe.router.bias_E), (ep, tp, options)
            assert whole.moe.router.bias_E.abs().max() > 0.01


def check_copies_of_the_layer() -> None:
    """Without a mesh, ranks have tokens of their own, here unequally many; one that saw none takes part."""
    rank = dist.get_rank()
    for options in OPTIONS:
        layer, whole = mixture(None, options), mixture(single_process_mesh(), options)
        parts = draw(0)[:16], draw(0)[16:]
        layer(parts[rank])
        whole(draw(0))
        for model in (layer, whole):
            model.balance()
        assert torch.equal(layer.moe.router.bias_E, whole.moe.router.bias_E)
        if rank == 0:
            layer(draw(1))
        layer.balance()
        whole(draw(1))
        whole.balance()
        assert torch.equal(layer.moe.router.bias_E, whole.moe.router.bias_E), options


def check_models_alone_reduce_once() -> None:
    ids = torch.randint(1, 11, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    ids[:, 6:] = 0  # padding of the classifier
    models: list[nn.Module] = [
        Transformer(16, 2, 4, 2, 11, seed=1, balance="quantile", load_loss_coef=1e-2),
        SwitchClassifier(4, 16, 24, 11, num_heads=2, num_layers=2, seed=1, balance="quantile"),
    ]
    for model in models:
        model(ids)
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce:
            model.balance()
        assert reduce.call_count == 1
        held = [buffer for name, buffer in model.named_buffers() if name.endswith("bias_E")]
        assert len(held) == 2
        for bias_E in held:
            assert bias_E.abs().max() > 1e-3
            mean_E = bias_E.clone()
            dist.all_reduce(mean_E)
            assert torch.equal(mean_E / 2, bias_E)


def test_over_ranks(tmp_path: Path) -> None:
    run_checks(
        2,
        [
            check_every_token_counts_once_in_one_reduction,
            check_the_layer_alone_over_a_mesh,
            check_copies_of_the_layer,
            check_models_alone_reduce_once,
        ],
    )


def test_the_bias_resumes_in_any_layout(tmp_path: Path) -> None:
    run_checks(2, [check_the_bias_resumes_in_any_layout], str(tmp_path))
