"""The MoE layer and the decoder over all-to-all against one process that holds all experts and all tokens."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import Config, ModelConfig, MoEConfig
from moe_dist.kernels.registry import resolve_backends
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import Routing, StepContext
from moe_dist.parallel.collectives import all_gather, all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize, spec_of
from tests.dist.helpers import KEY, TinyRun, assert_same, logical, run_checks, tiny_config

T, D, E = 32, 8, 8  # tokens of the whole micro-step, width, experts
LAYOUTS = [(ep, tp, sp) for ep in (1, 2, 4) for tp, sp in ((1, False), (2, False), (2, True))]
FLOAT64 = dict(rtol=1e-9, atol=1e-11)


def draw(seed: int, *shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(moe: MoEConfig, mesh: Mesh, sequence_parallel: bool = False) -> MoE:
    model = ModelConfig(d_model=D, num_heads=2, d_ff=12, moe=moe)
    built = MoE(resolve_backends(model, mesh.ep.size), 0, mesh, sequence_parallel, 0.3).double()
    initialize(built, seed=1)
    return built


def meshes() -> dict[tuple[int, int], Mesh]:
    return {(ep, tp): create_mesh(ep, tp) for ep, tp in sorted({(ep, tp) for ep, tp, _ in LAYOUTS})}


def check_layer() -> None:
    """Every drop policy, both wires, every layout of 4 ranks; "local" where all experts are here, and all_to_all."""
    made = meshes()
    for policy, factor, top_k in (("position", 1.0, 2), ("score", 0.8, 1), ("random", 1.0, 2), ("position", None, 3)):
        moe = MoEConfig(
            num_experts=E, top_k=top_k, capacity_factor=factor, drop_policy=policy, num_shared_experts=1, experts="loop"
        )
        for ep, tp, sp in LAYOUTS:
            for dispatch, wire in (("all_to_all", "ragged"), ("all_to_all", "padded"), ("local", "ragged")):
                if dispatch == "all_to_all" or ep == 1:
                    compare_layer(replace(moe, dispatch=dispatch, wire=wire), made[ep, tp], sp, draw(0, T, D))


def compare_layer(moe: MoEConfig, mesh: Mesh, sequence_parallel: bool, x_TD: Tensor) -> None:
    """Output, gradient of the input and of every weight. The loss weighs outputs and the auxiliary loss."""
    tokens, weight_TD = len(x_TD), draw(1, *x_TD.shape)
    whole = layer(replace(moe, dispatch="local"), single_process_mesh())
    x_TD = x_TD.clone().requires_grad_()
    expected_TD, expected = whole(x_TD, StepContext(KEY))
    ((expected_TD * weight_TD).sum() + expected.aux_loss).backward()

    part = layer(moe, mesh, sequence_parallel)
    cut = mesh.world if sequence_parallel or mesh.tp.size == 1 else mesh.dp
    own = slice(cut.rank * (tokens // cut.size), (cut.rank + 1) * (tokens // cut.size))
    own_TD = x_TD.detach()[own].clone().requires_grad_()
    y_TD, stats = part(own_TD, StepContext(KEY))
    ((y_TD * weight_TD[own]).sum() + stats.aux_loss / mesh.layout.dp).backward()

    torch.testing.assert_close(y_TD.detach(), expected_TD.detach()[own], **FLOAT64)
    torch.testing.assert_close(own_TD.grad, x_TD.grad[own], **FLOAT64)
    assert stats.load_E.tolist() == expected.load_E.tolist()
    assert stats.kept_E.tolist() == expected.kept_E.tolist()
    for (name, param), (_, reference) in zip(part.named_parameters(), whole.named_parameters(), strict=True):
        spec = spec_of(param)
        rows = slice(spec.start, spec.start + param.shape[0])
        grad = all_reduce(param.grad.clone(), mesh.edp if spec.shard == "expert" else mesh.dp)
        torch.testing.assert_close(grad, reference.grad[rows], **FLOAT64, msg=lambda text, name=name: f"{name}: {text}")


def check_ranks_that_send_or_receive_nothing() -> None:
    """All tokens want expert 0. Under `position` the last ranks then lose every token, and most ranks get no rows."""
    x_TD = draw(0, T, D).abs() + 1
    x_TD[:, 1:] *= 1e-3
    for factor in (None, 1.0):
        moe = MoEConfig(num_experts=E, top_k=1, capacity_factor=factor, dispatch="all_to_all", experts="loop")
        for wire in ("ragged", "padded"):
            for ep, tp in ((2, 1), (4, 1), (4, 2)):
                compare_layer(replace(moe, wire=wire), create_mesh(ep, tp), tp > 1, x_TD)


def check_ranks_without_tokens() -> None:
    """Ranks hold 3, 0, 5 and 0 tokens: they all take part in every exchange."""
    mesh, tokens = create_mesh(4, 1), (3, 0, 5, 0)
    alone = single_process_mesh()
    x_TD, experts_TK = draw(0, sum(tokens), D), torch.arange(sum(tokens) * 2).view(-1, 2) * 3 % E
    weights_TK, scale_ED = draw(2, sum(tokens), 2), draw(3, E, D)
    first = sum(tokens[: mesh.rank])
    own = slice(first, first + tokens[mesh.rank])
    moe = MoEConfig(num_experts=E, capacity_factor=None)

    def outcome(dispatcher: Any, here: Mesh, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Expert i multiplies by scale_ED[i]; output and gradients of tokens and combine weights."""
        x, weights = x_TD[rows].clone().requires_grad_(), weights_TK[rows].clone().requires_grad_()
        probs = torch.zeros(len(x), E, dtype=torch.float64)
        plan = Capacity(moe, 0, here.world)(Routing(probs, probs, experts_TK[rows], weights), StepContext(KEY))
        rows_RD, trip = dispatcher.dispatch(x, plan)
        local = E // here.ep.size
        scale_eD = scale_ED[here.ep.rank * local : (here.ep.rank + 1) * local]
        scaled_RD = rows_RD * scale_eD.repeat_interleave(torch.tensor(trip.rows_per_expert), 0)
        y = dispatcher.combine(scaled_RD, weights, trip)
        (y * torch.arange(1.0, D + 1)).sum().backward()
        return y.detach(), x.grad, weights.grad

    expected = outcome(LocalDispatcher(alone), alone, slice(None))
    for wire in ("ragged", "padded"):
        found = outcome(AllToAllDispatcher(mesh, wire), mesh, own)
        for actual, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, whole[own], **FLOAT64)


def check_local_capacity_is_each_ranks_own() -> None:
    """capacity_scope local: every rank drops what it would drop alone."""
    moe = MoEConfig(
        num_experts=E, top_k=2, capacity_factor=0.5, capacity_scope="local", dispatch="all_to_all", experts="loop"
    )
    x_TD, mesh = draw(0, T, D), create_mesh(4, 1)
    own_TD = x_TD.chunk(4)[mesh.rank]
    y_TD, stats = layer(moe, mesh)(own_TD, StepContext(KEY))
    alone_TD, alone = layer(replace(moe, dispatch="local"), single_process_mesh())(own_TD, StepContext(KEY))
    torch.testing.assert_close(y_TD, alone_TD, **FLOAT64)
    assert stats.kept_E.tolist() == all_reduce(alone.kept_E.clone(), mesh.world).tolist()
    assert stats.kept_E.sum() < stats.load_E.sum() == T * 2


def check_decoder() -> None:
    """Loss, statistics, logits and every reduced gradient, in float64 through the native engine."""
    changes: dict[str, Any] = {
        "model__moe__experts": "loop",
        "model__moe__capacity_factor": 1.0,
        "train__accumulation": 2,
    }
    alone = TinyRun(tiny_config(**changes), single_process_mesh(), torch.float64)
    loss, expected = alone.forward_backward(0)
    grads, norm = logical(alone.engine, "grad"), alone.engine.update(1e-3)
    logits = all_logits(alone)
    for ep, tp, sp in LAYOUTS:
        mesh = create_mesh(ep, tp)
        for wire, recompute in (("ragged", "none"), ("padded", "block")):
            layout = {"parallel__ep": ep, "parallel__tp": tp, "parallel__sequence_parallel": sp}
            config = tiny_config(
                **changes,
                **layout,
                model__moe__dispatch="all_to_all",
                model__moe__wire=wire,
                model__recompute=recompute,
            )
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


def test_four_ranks_mean_what_one_process_means() -> None:
    run_checks(
        4,
        [
            check_layer,
            check_ranks_that_send_or_receive_nothing,
            check_ranks_without_tokens,
            check_local_capacity_is_each_ranks_own,
            check_decoder,
        ],
    )


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


def test_idle_experts_and_ranks_never_hang() -> None:
    run_checks(4, [check_all_idle_cases])
