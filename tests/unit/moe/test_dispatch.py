"""There and back again: with experts that change nothing, a token returns as its kept weights times itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.permute.backend import Permutation
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import combine_rows, gather_rows
from moe_dist.kernels.top_k.reference import top_k_experts
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, DispatchPlan, Routing
from moe_dist.moe.dispatch import Dispatcher, make_dispatcher
from moe_dist.moe.dispatch.base import EtpDispatcher, RowExperts
from moe_dist.moe.dispatch.counts import order_of, ranges, sent_rows, transposed
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.overlap import places
from moe_dist.moe.dispatch.wire import Wire, pack, row_bytes, unpack
from moe_dist.parallel.mesh import Group, Layout, mesh_without_processes, single_process_mesh
from moe_dist.step import Site
from tests.unit.helpers import context

KINDS = [dict(dispatch=kind) for kind in ("local", "all_to_all", "hierarchical", "all_gather")]
KINDS += [dict(dispatch="all_to_all", wire="padded")]
E = 5


@pytest.fixture(params=KINDS, ids=lambda kind: " ".join(kind.values()))
def dispatcher(request: pytest.FixtureRequest) -> Dispatcher:
    """Every kind on a single rank, where an exchange leaves rows where they are."""
    return make_dispatcher(MoEConfig(**request.param), single_process_mesh())


def chosen(tokens: int, top_k: int, factor: float | None, seed: int = 0) -> tuple[Tensor, Choice]:
    """Random tokens, and a choice with random weights, in float64; expert 1 is never chosen."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    logits_TE[:, 1] = -100
    stats = top_k_experts(logits_TE, top_k)
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    moe = MoEConfig(num_experts=E, top_k=top_k, capacity_factor=factor)
    routing = Routing(stats.experts_TK, weights_TK, logits_TE, None, stats)
    choice = Choice(routing, Capacity(moe, Site(0), Group())(routing, context()), weights_TK)
    return torch.randn(tokens, 3, generator=generator, dtype=torch.float64), choice


def scaled(scale_E: Tensor) -> RowExperts:
    """Expert i multiplies by scale_E[i]."""

    def experts(x_XD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
        scale_R = scale_E.repeat_interleave(torch.tensor(order.rows_per_expert))
        return combine_rows(gather_rows(x_XD, order) * scale_R[:, None], weights_XK, order)

    return experts


@pytest.mark.parametrize("factor", [None, 0.3, 0.8])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identity_experts(dispatcher: Dispatcher, top_k: int, factor: float | None) -> None:
    x_TD, choice = chosen(11, top_k, factor)
    y_TD, sent_bytes = dispatcher.carry(x_TD, choice, scaled(torch.ones(E)))
    kept_TK = choice.plan.kept_TK
    torch.testing.assert_close(y_TD, (choice.weights_TK * kept_TK).sum(-1, keepdim=True) * x_TD)
    assert kept_TK.all() == (factor is None)
    assert sent_bytes == 0


@pytest.mark.parametrize("factor", [None, 0.3])
def test_rows_in_order_lie_expert_after_expert(dispatcher: Dispatcher, factor: float | None) -> None:
    x_TD, choice = chosen(11, 2, factor)
    plan, met = choice.plan, []

    def experts(x_XD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
        met.append((gather_rows(x_XD, order), list(order.rows_per_expert)))
        return x_XD

    dispatcher.carry(x_TD, choice, experts)
    [(rows_RD, counts)] = met
    expected = [x_TD[t] for e in range(E) for t in range(11) if (plan.kept_TK[t] & (plan.experts_TK[t] == e)).any()]
    assert torch.equal(rows_RD, torch.stack(expected))
    assert counts == plan.experts_TK[plan.kept_TK].bincount(minlength=E).tolist()
    assert counts[1] == 0


@pytest.mark.parametrize("factor", [None, 0.3])
def test_distinct_experts_and_gradients(dispatcher: Dispatcher, factor: float | None) -> None:
    """Expert i multiplies by i + 2; the reference is a masked sum that never moves a row."""
    x_TD, choice = chosen(7, 2, factor)
    plan, weights_TK = choice.plan, choice.weights_TK.requires_grad_()
    x_TD.requires_grad_()
    y_TD, _ = dispatcher.carry(x_TD, choice, scaled(torch.arange(E) + 2.0))
    expected = ((plan.experts_TK + 2) * plan.kept_TK * weights_TK).sum(-1, keepdim=True) * x_TD
    torch.testing.assert_close(y_TD, expected)
    weight_TD = torch.randn_like(y_TD)
    found = torch.autograd.grad((y_TD * weight_TD).sum(), (x_TD, weights_TK))
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight_TD).sum(), (x_TD, weights_TK)))


def test_dropped_tokens_come_back_as_zero(dispatcher: Dispatcher) -> None:
    x_TD, choice = chosen(12, 1, 0.3)
    y_TD, _ = dispatcher.carry(x_TD, choice, scaled(torch.ones(E)))
    dropped_T = ~choice.plan.kept_TK[:, 0]
    assert dropped_T.sum() >= 8  # C = ceil(0.3 * 12 / 5) = 1: at most 4 used experts keep one each
    assert torch.equal(y_TD[dropped_T], torch.zeros_like(y_TD[dropped_T]))
    assert y_TD[~dropped_T].abs().min() > 0


def test_nothing_kept(dispatcher: Dispatcher) -> None:
    x_TD, choice = chosen(6, 2, 1.0)
    x_TD.requires_grad_()
    weights_TK = choice.weights_TK.requires_grad_()
    plan = choice.plan
    nothing = replace(plan, kept_TK=torch.zeros_like(plan.kept_TK), kept_WE=torch.zeros_like(plan.kept_WE))

    def experts(x_XD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
        assert order.slots_R.numel() == 0
        assert order.rows_per_expert == (0,) * E
        return scaled(torch.ones(E))(x_XD, weights_XK, order)

    y_TD, _ = dispatcher.carry(x_TD, replace(choice, plan=nothing), experts)
    assert torch.equal(y_TD, torch.zeros(6, 3, dtype=torch.float64))
    y_TD.sum().backward()
    assert torch.equal(x_TD.grad, torch.zeros_like(x_TD))
    assert torch.equal(weights_TK.grad, torch.zeros_like(weights_TK))


def test_an_expert_in_parts_is_their_sum(dispatcher: Dispatcher) -> None:
    """Part p of expert i multiplies by 3 i + p: together by 9 i + 3."""
    x_TD, choice = chosen(7, 2, 0.8)
    y_TD, _ = EtpDispatcher(dispatcher, 3).carry(x_TD, choice, scaled(torch.arange(3.0 * E)))
    factor_TK = (9 * choice.plan.experts_TK + 3) * choice.plan.kept_TK * choice.weights_TK
    torch.testing.assert_close(y_TD, factor_TK.sum(-1, keepdim=True) * x_TD)


def test_dispatchers_that_cannot_be_made() -> None:
    mesh = mesh_without_processes(Layout(world=2, ep=2), rank=0)
    with pytest.raises(ValueError, match="dispatch=local needs all experts on every rank, but ep=2"):
        make_dispatcher(MoEConfig(dispatch="local"), mesh)
    with pytest.raises(ValueError, match=r"'pigeon': choose local, all_to_all, hierarchical or all_gather"):
        make_dispatcher(MoEConfig(dispatch="pigeon"), mesh)
    for kind in ("local", "hierarchical", "all_gather"):
        with pytest.raises(ValueError, match=f"overlap_chunks=2 is of dispatch=all_to_all, not {kind}"):
            make_dispatcher(MoEConfig(dispatch=kind, overlap_chunks=2), single_process_mesh())
    with pytest.raises(ValueError, match="ep groups of 6 consecutive ranks lie unevenly on nodes of node_size=4"):
        make_dispatcher(
            MoEConfig(dispatch="hierarchical"), mesh_without_processes(Layout(world=12, ep=6, node_size=4), rank=0)
        )


# Who sends what, without sending it


def test_ranges_by_hand() -> None:
    assert ranges(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    # a: 0 1, b: 2, c: nothing, d: 3 4 5, read column by column: a c b d
    assert transposed(torch.tensor([[2, 1], [0, 3]])).tolist() == [0, 1, 2, 3, 4, 5]
    # a: 0, b: 1 2, c: 3 4 5, d: nothing: a c b d
    assert transposed(torch.tensor([[1, 2], [3, 0]])).tolist() == [0, 3, 4, 5, 1, 2]


def exchanged(rows: list[Tensor], send: Callable[[int], tuple[int, ...]], groups: list[list[int]]) -> list[Tensor]:
    """All-to-all of every group of ranks, in one process."""
    out = list(rows)
    for ranks in groups:
        cut = {rank: rows[rank].split(list(send(rank))) for rank in ranks}
        for place, rank in enumerate(ranks):
            out[rank] = torch.cat([cut[other][place] for other in ranks])
    return out


@pytest.mark.parametrize("node_size", [1, 2, 3, 4, 6, 12])
def test_two_steps_end_where_one_does(node_size: int) -> None:
    """12 ranks of 2 experts: rows are (source, expert, number), and must arrive by source, then by expert."""
    ranks, local = 12, 2
    sent_wwe = torch.randint(0, 4, (ranks, ranks, local), generator=torch.Generator().manual_seed(node_size))
    layout = Layout(ranks, ranks, node_size=node_size)
    trips, rows = [], []
    for rank in range(ranks):
        dispatcher = HierarchicalDispatcher(mesh_without_processes(layout, rank), Permutation())
        trips.append(dispatcher.trip(sent_wwe, torch.device("cpu")))
        place_E, sent_E = dispatcher._departure(local), sent_wwe[rank].flatten()
        by_place = place_E.argsort()
        expert_S = by_place.repeat_interleave(sent_E[by_place])
        rows.append(torch.stack([torch.full_like(expert_S, rank), expert_S], 1))
    nodes = [list(layout.ranks("ep_node", rank)) for rank in range(0, ranks, node_size)]
    across = [list(layout.ranks("ep_across", rank)) for rank in range(node_size)]
    halfway = exchanged(rows, lambda rank: trips[rank].node_send, nodes)
    for rank, trip in enumerate(trips):
        assert len(halfway[rank]) == sum(trip.node_receive)
        if trip.forth_Z is not None:
            halfway[rank] = halfway[rank][trip.forth_Z]
            assert torch.equal(trip.forth_Z[trip.back_Z], torch.arange(len(trip.forth_Z)))
    arrived = exchanged(halfway, lambda rank: trips[rank].across_send, across)
    for rank, trip in enumerate(trips):
        held_we = sent_wwe[:, rank]
        expected = [
            [source, rank * local + k]
            for source in range(ranks)
            for k in range(local)
            for _ in range(held_we[source, k])
        ]
        assert arrived[rank].tolist() == expected
        assert sum(trip.across_receive) == len(expected)


def test_counts_are_those_of_the_ranks_of_the_group() -> None:
    """8 ranks, ep 4: the second group's counts are rows 4 to 7 of kept_WE."""
    kept_WE = torch.arange(8 * 12).view(8, 12)
    plan = DispatchPlan(torch.zeros(0, 1), torch.zeros(0, 1), kept_WE, kept_WE, None, torch.zeros(1))
    sent_wwe = sent_rows(plan, Group((4, 5, 6, 7), 2))
    assert sent_wwe.shape == (4, 4, 3)
    assert torch.equal(sent_wwe.flatten(1), kept_WE[4:])


def test_order_by_place() -> None:
    """Tokens want experts 2, 0, 1, 2; expert 2 leaves first, then 0; expert 1's is dropped."""
    experts_TK, kept_TK = torch.tensor([[2], [0], [1], [2]]), torch.tensor([[True], [True], [False], [True]])
    plan = DispatchPlan(experts_TK, kept_TK, torch.zeros(1, 3), torch.zeros(1, 3), None, torch.zeros(3))
    assert order_of(plan, Permutation()).slots_R.tolist() == [1, 0, 3]
    assert order_of(plan, Permutation(), place_E=torch.tensor([1, 2, 0])).slots_R.tolist() == [0, 3, 1]


# What travels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_rows(dtype: torch.dtype) -> None:
    rows_YD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).mul(torch.logspace(-20, 20, 6)[:, None])
    rows_YD = rows_YD.to(dtype)
    rows_YD[2] = 0
    for form, tolerance in (("same", 0.0), ("bf16", 2**-8), ("fp8", 2**-4)):
        packed = pack(rows_YD, form)
        assert packed[0].nbytes == row_bytes(64, dtype, form)
        found_YD = unpack(packed, form, dtype)
        assert found_YD.dtype == dtype
        # Relative to each number, but for what fp8 loses below its smallest: 2^-9 of a scale, which is 1/448 of a row.
        floor_Y1 = rows_YD.abs().amax(1, keepdim=True).double() * (2**-10 / 448 if form == "fp8" else 0.0)
        off_YD = (found_YD.double() - rows_YD.double()).abs()
        assert (off_YD <= tolerance * rows_YD.double().abs() + floor_Y1).all(), form
    assert row_bytes(64, torch.float32, "fp8") == 68  # the row's scale is 4 bytes


def test_packed_rows_that_are_not_finite_stay_so() -> None:
    rows_YD = torch.ones(3, 4)
    rows_YD[0, 1], rows_YD[1, 2] = torch.nan, torch.inf
    for form in ("bf16", "fp8"):
        found_YD = unpack(pack(rows_YD, form), form, torch.float32)
        assert not found_YD[0].isfinite().all() and not found_YD[1].isfinite().all()
        assert torch.equal(found_YD[2], rows_YD[2])


def test_no_rows_to_pack() -> None:
    for form in ("same", "bf16", "fp8"):
        assert unpack(pack(torch.zeros(0, 8), form), form, torch.float32).shape == (0, 8)


def test_only_the_way_out_is_fp8() -> None:
    assert (Wire.of("same"), Wire.of("bf16"), Wire.of("fp8")) == (("same",) * 2, ("bf16",) * 2, ("fp8", "bf16"))


def test_places_in_parts_by_hand() -> None:
    """Two ranks of four experts in 2 parts: 0 1 4 5 leave first, then 2 3 6 7."""
    assert places(2, 4, 2).argsort().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
