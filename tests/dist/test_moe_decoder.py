"""The decoder over several ranks against one process, and training in which most ranks and experts idle."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import create_mesh, single_process_mesh
from moe_dist.step import StepContext
from tests.dist.helpers import KEY, TinyRun, assert_same, logical, run_checks, tiny_config

if TYPE_CHECKING:
    from moe_dist.config import Config

LAYOUTS = [(ep, tp, sp) for ep in (1, 2, 4) for tp, sp in ((1, False), (2, False), (2, True))]


def check_decoder() -> None:
    """Loss, statistics, logits and every reduced gradient, in float64 through the native engine."""
    changes: dict[str, Any] = {
        "model__moe__experts": "loop",
        "model__moe__capacity_factor": 1.0,
        "model__moe__num_experts": 8,
        "train__accumulation": 2,
    }
    alone = TinyRun(tiny_config(**changes), single_process_mesh(), torch.float64)
    loss, expected = alone.forward_backward(0)
    grads, norm = logical(alone.engine, "grad"), alone.engine.update(1e-3)
    logits = all_logits(alone)
    for ep, tp, sp in LAYOUTS:
        mesh = create_mesh(ep, tp, node_size=2)
        hows: list[dict[str, Any]] = [dict(wire="ragged", recompute="none"), dict(wire="padded", recompute="block")]
        if ep == 4:
            hows += [dict(overlap_chunks=2, recompute="block"), dict(dispatch="hierarchical", recompute="block")]
            hows += [dict(dispatch="all_gather", recompute="block")]
        for how in hows:
            recompute = how.pop("recompute")
            layout = {"parallel__ep": ep, "parallel__tp": tp, "parallel__sequence_parallel": sp}
            carried = {f"model__moe__{name}": value for name, value in (dict(dispatch="all_to_all") | how).items()}
            config = tiny_config(**changes, **layout, **carried, model__recompute=recompute)
            run = TinyRun(config, mesh, torch.float64)
            found, output = run.forward_backward(0)
            assert abs(found - loss) < 1e-10, (config, found, loss)
            for stats, reference in zip(output.stats, expected.stats, strict=True):
                assert stats.load_E.tolist() == reference.load_E.tolist()
                assert stats.kept_E.tolist() == reference.kept_E.tolist()
            assert_same(logical(run.engine, "grad"), grads, rtol=1e-7, atol=1e-10)
            assert abs(run.engine.update(1e-3) / norm - 1) < 1e-9
            torch.testing.assert_close(all_logits(run), logits, rtol=1e-7, atol=1e-9)


def all_logits(run: TinyRun) -> Tensor:
    """Logits of the next micro-batch, dropless, of all sequences."""
    tokens_BS, targets_BS = run.batch(1)
    context = StepContext(KEY, "dropless")
    logits_BSV = run.engine.evaluate(tokens_BS, None, context, "logits")
    losses_BS = run.engine.evaluate(tokens_BS, targets_BS, context, "token_losses")
    chosen_BS = logits_BSV.log_softmax(-1).gather(2, targets_BS[..., None])[..., 0]
    torch.testing.assert_close(losses_BS, -chosen_BS, rtol=1e-7, atol=1e-9)
    return all_gather(logits_BSV, run.mesh.dp)


def check_idle_experts(steps: int, changes: dict[str, Any]) -> None:
    """Every token goes to expert 0 for many steps: the others' gradients are zero, and nobody waits for them."""
    config: Config = tiny_config(
        parallel__ep=4,
        model__num_layers=1,
        model__moe__top_k=1,
        model__moe__balance_loss_coef=0.0,  # both would pull the router away from expert 0
        model__moe__z_loss_coef=0.0,
        **changes,
    )
    run = TinyRun(config, create_mesh(4, 1))
    with torch.no_grad():
        for piece in run.engine.held("weight"):
            # The first feature of every token is large, and only expert 0 looks at it.
            if piece.name == "embedding.weight":
                set_column(piece.values, piece.start, 32, 4.0)
            elif piece.name.endswith("router.weight"):
                piece.values.zero_()
                if piece.start == 0 and len(piece.values):
                    piece.values[0] = 20.0
    run.engine.restore(0)
    for step in range(steps):
        loss, output = run.forward_backward(step)
        load = output.stats[0].load_E.tolist()
        assert load == [128, 0, 0, 0], f"step {step}: {load}"
        for piece in run.engine.held("grad"):
            if "experts.w_" in piece.name:
                square = float(piece.values.double().square().sum())
                assert (square > 0) is (dist.get_rank() == 0), f"step {step}: {piece.name} {square}"
        norm = run.engine.update(config.optim.lr)
        assert 0 < norm < 1e6 and 0 < loss < 10, f"step {step}: loss {loss}, norm {norm}"


def set_column(values: Tensor, start: int, width: int, value: float) -> None:
    """Set the first column of this range of a flattened [rows, width] matrix."""
    index = torch.arange(start, start + values.numel())
    values[index % width == 0] = value


IDLE: list[tuple[int, dict[str, Any]]] = [
    (100, {"model__moe__capacity_factor": None}),
    (20, {"model__moe__capacity_factor": 1.0, "model__moe__wire": "padded"}),
    (100, {"model__moe__capacity_factor": None, "engine__name": "deepspeed", "engine__zero_stage": 1}),
]


def check_all_idle_cases() -> None:
    for steps, changes in IDLE:
        check_idle_experts(steps, changes)


def test_four_ranks_train_as_one_process_does_and_never_hang() -> None:
    run_checks(4, [check_decoder, check_all_idle_cases])
