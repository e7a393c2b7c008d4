"""The MoE layer over several ranks against one process that holds all experts and all tokens."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config import ModelConfig, MoEConfig
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.reference import combine_rows, gather_rows
from moe_dist.kernels.top_k.reference import top_k_experts
from moe_dist.models.backends import resolve_backends
from moe_dist.models.block import moe_layer
from moe_dist.moe import capacity
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, Routing
from moe_dist.moe.dispatch import all_to_all, make_dispatcher
from moe_dist.moe.dispatch import base as base_dispatch
from moe_dist.moe.layer import MoE
from moe_dist.parallel import collectives
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize, spec_of
from moe_dist.step import Site, StepContext
from tests.dist.helpers import KEY, assert_same, raised, run_checks

T, D, E = 32, 8, 8  # tokens of the whole micro-step, width, experts
TENSOR = ((1, False), (2, False), (2, True))  # tp, sequence_parallel
FLOAT64 = dict(rtol=1e-9, atol=1e-11)
# All ways to carry rows, and ranks of a node. `overlap_chunks` divides the experts of a rank, of which ep 4 leaves two.
CARRIERS: list[tuple[dict[str, Any], int | None]] = [
    (dict(dispatch="all_to_all"), None),
    (dict(dispatch="all_to_all", wire="padded"), None),
    (dict(dispatch="all_to_all", overlap_chunks=2), None),
    (dict(dispatch="all_to_all", overlap_chunks=2, wire="padded"), None),
    (dict(dispatch="hierarchical"), 1),
    (dict(dispatch="hierarchical"), 2),
    (dict(dispatch="hierarchical"), 4),
    (dict(dispatch="all_gather"), None),
]


def draw(seed: int, *shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_sided() -> Tensor:
    """Tokens that all want the same expert."""
    x_TD = draw(0, T, D).abs() + 1
    x_TD[:, 1:] *= 1e-3
    return x_TD


@dataclass
class Outcome:
    """What one layer gives on this rank; gradients of parameters as they are before any reduction."""

    y_TD: Tensor
    grad_x_TD: Tensor
    grad_weights_TK: Tensor | None  # none where rerouted assignments are weighed again
    load: list[int]
    kept: list[int]
    grads: dict[str, Tensor]
    sent_bytes: int = 0


@dataclass
class Case:
    """A layer and the tokens of the whole micro-step; the loss weighs outputs and, if asked for, the auxiliary loss."""

    moe: MoEConfig
    x_TD: Tensor = field(default_factory=lambda: draw(0, T, D))
    auxiliary: bool = True
    activation: str = "swiglu"
    dtype: torch.dtype = torch.float64

    def run(self, mesh: Mesh, moe: MoEConfig, own: slice) -> tuple[Outcome, MoE]:
        model = ModelConfig(d_model=D, num_heads=2, d_ff=12, activation=self.activation, moe=moe)
        layer = moe_layer(resolve_backends(model, mesh.ep.size), 0, mesh, 0.3).to(self.dtype)
        initialize(layer, seed=1)
        held: list[Tensor] = []
        layer.router.register_forward_hook(lambda *call: call[2].weights_TK.retain_grad() or held.append(call[2]))
        x_TD = self.x_TD[own].to(self.dtype).requires_grad_()
        y_TD, stats = layer(x_TD, StepContext(KEY))
        loss = (y_TD * draw(1, *self.x_TD.shape)[own].to(self.dtype)).sum()
        if self.auxiliary:
            loss = loss + stats.aux_loss / mesh.layout.dp
        loss.backward()
        grads = {name: param.grad for name, param in layer.named_parameters()}
        load, kept = stats.load_E.tolist(), stats.kept_E.tolist()
        found = Outcome(y_TD.detach(), x_TD.grad, held[0].weights_TK.grad, load, kept, grads, stats.sent_bytes)
        return found, layer

    def alone(self) -> Outcome:
        """The oracle."""
        plain = replace(self.moe, dispatch="local", overlap_chunks=1, wire_dtype="same")
        return self.run(single_process_mesh(), plain, slice(None))[0]

    def compare(
        self,
        expected: Outcome,
        mesh: Mesh,
        how: dict[str, Any],
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Output, gradients of tokens, combine weights and parameters. tokens: of each rank, where not equal."""
        cut = mesh.token_ranks if mesh.sequence_parallel or mesh.tp.size == 1 else mesh.dp
        own = part_of(cut.rank, tokens or (len(self.x_TD) // cut.size,) * cut.size)
        routed = part_of(mesh.rank, tokens or (len(self.x_TD) // mesh.token_ranks.size,) * mesh.token_ranks.size)
        moe = replace(self.moe, **how)
        found, layer = self.run(mesh, moe, own)
        where = f"ranks {mesh.layout} {mesh.sequence_parallel=} {moe}"
        pairs = [("y", found.y_TD, expected.y_TD[own]), ("x", found.grad_x_TD, expected.grad_x_TD[own])]
        if expected.grad_weights_TK is not None:
            pairs.append(("weights", found.grad_weights_TK, expected.grad_weights_TK[routed]))
        for name, actual, whole in pairs:
            torch.testing.assert_close(actual, whole, **FLOAT64, msg=lambda text, name=name: f"{name} {text}\n{where}")
        assert (found.load, found.kept) == (expected.load, expected.kept), where
        for name, param in layer.named_parameters():
            spec = spec_of(param)
            grad = all_reduce(found.grads[name].clone(), mesh.edp if spec.shard == "expert" else mesh.dp)
            whole = expected.grads[name].view(-1)[spec.flat_start : spec.flat_start + grad.numel()]
            torch.testing.assert_close(
                grad.view(-1), whole, **FLOAT64, msg=lambda text, name=name: f"{name} {text}\n{where}"
            )


def part_of(rank: int, tokens: Sequence[int]) -> slice:
    first = sum(tokens[:rank])
    return slice(first, first + tokens[rank])


@cache
def mesh_of(ep: int, tp: int = 1, etp: int = 1, node_size: int | None = None) -> Mesh:
    """Process groups are dear: each mesh is made once in a process."""
    return create_mesh(ep, tp, etp, node_size=node_size)


def carriers(ep: int, etp: int) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Those that make sense where experts lie on ep * etp ranks."""
    if ep * etp == 1:
        yield dict(dispatch="local"), None
    for how, node_size in CARRIERS:
        if ep * etp > 1 or node_size in (None, 1):
            yield how, node_size


CASES = [
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=1.0, num_shared_experts=1, experts="loop")),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=0.8, drop_policy="score"), activation="relu"),
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=1.0, drop_policy="random", overflow="reroute")),
    Case(MoEConfig(num_experts=E, top_k=3, capacity_factor=None)),
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=None, expert_bias=True, d_ff=[12, 8, 4, 10, 6, 12, 2, 8])),
    # All tokens want one expert. Under `position` the last ranks then lose every token; most ranks get no rows.
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=None), one_sided()),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=1.0, experts="loop"), one_sided()),
]


def check_layer() -> None:
    """Every way to carry rows, in every layout of 4 ranks, means what one process means."""
    for number, case in enumerate(CASES):
        expected = case.alone()
        # The first case meets everything; the others sequence parallelism or none beside tp 1, and no padded overlap.
        for tp, sequence_parallel in TENSOR if number == 0 else (TENSOR[0], TENSOR[1 + number % 2]):
            for ep, etp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
                if etp > 1 and case.moe.expert_bias:
                    continue  # validate refuses it
                for how, node_size in carriers(ep, etp):
                    if number == 0 or {"wire", "overlap_chunks"} - how.keys():
                        mesh = replace(mesh_of(ep, tp, etp, node_size), sequence_parallel=sequence_parallel)
                        case.compare(expected, mesh, how)
    assert max(CASES[-1].alone().load) == T


def check_ranks_without_tokens() -> None:
    """Ranks hold 3, 0, 5 and 0 tokens: they all take part in every exchange."""
    tokens = (3, 0, 5, 0)
    for top_k in (1, 2):
        moe = MoEConfig(num_experts=E, top_k=top_k, capacity_factor=None)
        case = Case(moe, draw(0, sum(tokens), D), auxiliary=False)
        expected = case.alone()
        for ep, etp in ((2, 1), (4, 1), (2, 2)):
            for how, node_size in carriers(ep, etp):
                case.compare(expected, mesh_of(ep, 1, etp, node_size), how, tokens=tokens)


def check_overlap_changes_no_bit() -> None:
    """The same rows and products in every number of parts. (Products of `loop` read rows in place, and MKL's last bit
    depends on their alignment: 16 numbers keep it.)"""
    mesh, moe = mesh_of(2), MoEConfig(num_experts=E, top_k=2, capacity_factor=1.0, dispatch="all_to_all")
    own = part_of(mesh.rank, (T // 4,) * 4)
    wires = [dict(wire="padded"), dict(wire_dtype="bf16"), dict(wire_dtype="fp8")]
    for changes in (dict(), *wires, dict(experts="loop", d_ff=16)):
        case = Case(replace(moe, **changes))
        whole, _ = case.run(mesh, case.moe, own)
        for parts in (2, 4):
            found, _ = case.run(mesh, replace(case.moe, overlap_chunks=parts), own)
            off = float((found.y_TD - whole.y_TD).abs().max())
            assert torch.equal(found.y_TD, whole.y_TD), f"{changes} {parts} parts: {off}"
            close = dict(rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found.grad_x_TD, whole.grad_x_TD, **close)
            torch.testing.assert_close(found.grad_weights_TK, whole.grad_weights_TK, **close)
            assert_same(found.grads, whole.grads, **close)
            if "wire" not in changes:  # each part is padded to its own fullest expert
                assert found.sent_bytes == whole.sent_bytes


def check_low_precision_wires() -> None:
    """bf16 and fp8 agree with `same` as far as they can, and send what their formats say."""
    moe = MoEConfig(num_experts=E, top_k=2, capacity_factor=1.0)
    for how, node_size in CARRIERS:
        mesh = mesh_of(4, 1, 1, node_size)
        own = part_of(mesh.rank, (T // 4,) * 4)
        case = Case(replace(moe, **how), dtype=torch.float32)
        exact, _ = case.run(mesh, case.moe, own)
        for wire_dtype, tolerance in (("bf16", 2e-2), ("fp8", 8e-2)):
            found, _ = case.run(mesh, replace(case.moe, wire_dtype=wire_dtype), own)
            assert found.kept == exact.kept
            pairs = [("y", found.y_TD, exact.y_TD), ("x", found.grad_x_TD, exact.grad_x_TD)]
            pairs += [("weights", found.grad_weights_TK, exact.grad_weights_TK)]
            pairs += [(name, found.grads[name], exact.grads[name]) for name in exact.grads]
            for name, actual, expected in pairs:
                off = float((actual - expected).norm() / expected.norm())
                assert 0 < off < tolerance, f"{how} {wire_dtype} {name}: {off}"
        if how["dispatch"] != "all_gather":
            bf16, _ = case.run(mesh, replace(case.moe, wire_dtype="bf16"), own)
            assert bf16.sent_bytes * 2 == exact.sent_bytes > 0


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """What every exchange of rows sends to other ranks; counts (int64) are none."""
    sent: list[int] = []
    own = dict(exchange=dist.all_to_all_single, gather=collectives._all_gather, scatter=collectives._reduce_scatter)

    def exchange(out: Tensor, x: Tensor, receive: list[int], send: list[int], group: Any, async_op: bool) -> Any:
        sent.append(x[:1].nbytes and (len(x) - send[dist.get_rank(group)]) * x[0].nbytes)
        return own["exchange"](out, x, receive, send, group=group, async_op=async_op)

    def gather(out: Tensor, x: Tensor, group: Any) -> Any:
        sent.append(0 if x.dtype == torch.int64 else out.nbytes - x.nbytes)
        return own["gather"](out, x, group=group)

    def scatter(out: Tensor, x: Tensor, group: Any) -> Any:
        sent.append(x.nbytes - out.nbytes)
        return own["scatter"](out, x, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives.dist, "all_to_all_single", exchange)
        patch.setattr(collectives, "_all_gather", gather)
        patch.setattr(collectives, "_reduce_scatter", scatter)
        yield sent


def check_sent_bytes() -> None:
    """What dispatchers say they send is what they send, for every wire."""
    for how, node_size in CARRIERS:
        mesh = mesh_of(4, 1, 1, node_size)
        logits_TE = draw(mesh.rank, 6, E).float()
        stats = top_k_experts(logits_TE, 2)
        routing = Routing(stats.experts_TK, stats.scores_TK, logits_TE, None, stats)
        plan = Capacity(MoEConfig(num_experts=E, capacity_factor=0.9), Site(0), mesh.token_ranks)(
            routing, StepContext(KEY)
        )
        choice = Choice(routing, plan, stats.scores_TK)
        if "overlap_chunks" in how:
            continue  # check_overlap_changes_no_bit: the same as without
        for wire_dtype in ("same", "bf16", "fp8"):
            dispatcher = make_dispatcher(MoEConfig(num_experts=E, **how, wire_dtype=wire_dtype), mesh)
            with counted_bytes() as sent:
                _, said = dispatcher.carry(draw(5, 6, D).float(), choice, unchanged)
            assert said == sum(sent) > 0, (how, wire_dtype, node_size, sent)


def unchanged(x_XD: Tensor, weights_XK: Tensor | None, order: RowOrder) -> Tensor:
    """Experts that give back what they get."""
    return combine_rows(gather_rows(x_XD, order), weights_XK, order)


def check_nodes() -> None:
    """LOCAL_WORLD_SIZE says how large a node is, and `spawn` sets it; uneven nodes are refused where they matter."""
    assert (create_mesh(4, 1).ep_node.size, os.environ["LOCAL_WORLD_SIZE"]) == (4, "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        mesh = create_mesh(4, 1)
    assert (mesh.ep_node.size, mesh.ep_across.size) == (2, 2)
    mesh = mesh_of(4, node_size=3)
    message = raised(ValueError, make_dispatcher, MoEConfig(dispatch="hierarchical"), mesh)
    assert "ep groups of 4 consecutive ranks lie unevenly on nodes of node_size=3" in message
    make_dispatcher(MoEConfig(dispatch="all_to_all"), mesh)


def check_unequal_tokens_under_capacity_are_refused() -> None:
    """On every rank, and before an exchange whose sizes would not fit."""
    mesh = mesh_of(4)
    for router in ("softmax", "sinkhorn"):
        moe = MoEConfig(num_experts=E, capacity_factor=1.0, dispatch="all_to_all", experts="loop", router=router)
        layer = moe_layer(ModelConfig(d_model=D, d_ff=12, kernels="torch", moe=moe), 0, mesh).double()
        message = raised(ValueError, layer, draw(0, 3 + mesh.rank, D), StepContext(KEY))
        assert "tokens" in message and "give" in message, message


def check_blocks_of_fixed_size_are_the_same() -> None:
    """What a GPU does on the padded wire, where it is not asked for counts: the same as by counts, also in unequal
    loads, pools, parts of experts, and where ranks share a limit or have one each."""
    base = MoEConfig(num_experts=E, top_k=2, capacity_factor=0.8, dispatch="all_to_all", wire="padded", experts="bmm")
    cases = [
        Case(base),
        Case(replace(base, capacity_pool=2, pool_floor=0.5)),
        Case(replace(base, top_k=1, experts="loop", overflow="reroute")),
        Case(replace(base, capacity_scope="local")),
        Case(replace(base, capacity_factor=1.0, top_k=1), one_sided()),
        Case(replace(base, overlap_chunks=2)),
    ]
    for case in cases:
        for ep, tp, etp in ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 1)):
            mesh = mesh_of(ep, tp, etp)
            own = part_of(mesh.dp.rank, (T // mesh.dp.size,) * mesh.dp.size)
            expected, _ = case.run(mesh, case.moe, own)
            with pytest.MonkeyPatch.context() as patch:
                for module in (capacity, all_to_all, base_dispatch):
                    patch.setattr(module, "readable", lambda x: False)
                found, _ = case.run(mesh, case.moe, own)
            assert (found.load, found.kept) == (expected.load, expected.kept), case
            for name in ("y_TD", "grad_x_TD", "grad_weights_TK"):
                actual, wanted = getattr(found, name), getattr(expected, name)
                assert (actual is None) == (wanted is None)
                if actual is not None:
                    where = f"{name}, {mesh.layout}, {case.moe}"
                    torch.testing.assert_close(actual, wanted, **FLOAT64, msg=lambda text, w=where: f"{w} {text}")
            assert_same(found.grads, expected.grads, **FLOAT64)
            if ep > 1:
                assert found.sent_bytes >= expected.sent_bytes > 0


def check_local_capacity_is_each_ranks_own() -> None:
    """capacity_scope local: every rank drops what it would drop alone."""
    moe = MoEConfig(num_experts=E, top_k=2, capacity_factor=0.5, capacity_scope="local", dispatch="all_to_all")
    case, mesh = Case(moe), mesh_of(4)
    own = part_of(mesh.rank, (T // 4,) * 4)
    found, _ = case.run(mesh, moe, own)
    alone, _ = case.run(single_process_mesh(), replace(moe, dispatch="local"), own)
    torch.testing.assert_close(found.y_TD, alone.y_TD, **FLOAT64)
    assert found.kept == all_reduce(torch.tensor(alone.kept), mesh.world).tolist()
    assert sum(found.kept) < sum(found.load) == T * 2


def test_four_ranks_mean_what_one_process_means() -> None:
    run_checks(
        4,
        [
            check_layer,
            check_ranks_without_tokens,
            check_overlap_changes_no_bit,
            check_low_precision_wires,
            check_sent_bytes,
            check_nodes,
            check_unequal_tokens_under_capacity_are_refused,
            check_local_capacity_is_each_ranks_own,
            check_blocks_of_fixed_size_are_the_same,
        ],
    )
