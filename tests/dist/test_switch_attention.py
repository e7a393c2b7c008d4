"""Switch attention over several ranks against one process with all experts and all tokens, in float64."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_dist import SwitchMultiQueryAttention, Transformer
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config import MoEConfig
from moe_dist.config.model import AttentionConfig, HeadSizes
from moe_dist.models.backends import resolve_attention
from moe_dist.moe.gate import Replay
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.heads import heads_to_tokens, tokens_to_heads
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize, spec_of
from moe_dist.step import Site, StepContext
from tests.dist.helpers import KEY, raised, run_checks

B, S, D, H, P, E = 4, 6, 10, 2, 4, 4
SIZES = HeadSizes.of(D, H, 1, P)
MORE_HEADS = HeadSizes.of(D, 6, 3, P)  # 3 key/value heads, cut by no tp
FLOAT64 = dict(rtol=1e-9, atol=1e-11)
CARRIERS: list[tuple[dict[str, Any], int | None]] = [
    (dict(dispatch="all_to_all"), None),
    (dict(dispatch="all_to_all", wire="padded"), None),
    (dict(dispatch="hierarchical"), 2),
    (dict(dispatch="all_gather"), None),
]


def draw(seed: int, *shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def mesh_of(ep: int, tp: int = 1, node_size: int | None = None) -> Mesh:
    return create_mesh(ep, tp, node_size=node_size)


@dataclass
class Witness:
    """Keeps what was decided."""

    experts_TK: Tensor | None = None
    kept_TK: Tensor | None = None

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        return scores

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        assert site.kind == "attention"
        self.experts_TK, self.kept_TK = experts_TK, kept_TK


@dataclass
class Found:
    """On one rank; gradients of parameters as they are before any reduction."""

    y_TD: Tensor
    grad_x_TD: Tensor
    witness: Witness
    load: list[int]
    kept: list[int]
    aux: Tensor
    grads: dict[str, Tensor]
    sent_bytes: int


@dataclass
class Case:
    moe: MoEConfig
    attention: dict[str, Any] = field(default_factory=dict)
    alibi: bool = False
    sizes: HeadSizes = SIZES
    recompute: bool = False
    x_BSD: Tensor = field(default_factory=lambda: draw(0, B, S, D))

    def run(self, mesh: Mesh, how: dict[str, Any]) -> tuple[Found, SwitchAttention]:
        section = AttentionConfig(kind="switch", moe=replace(self.moe, **how), **self.attention)
        section = resolve_attention(section, self.sizes, mesh.ep.size, "cpu")
        layer = SwitchAttention(self.sizes, section, mesh, 0, out_std=0.3)
        initialize(layer, seed=1)
        layer.double()
        rows, cut = B // mesh.dp.size, mesh.token_ranks if mesh.sequence_parallel else mesh.dp
        x_TD = own(self.x_BSD.flatten(0, 1), cut.rank, cut.size).clone().requires_grad_()
        rotary = None if self.alibi else rotary_table(torch.arange(S).double(), P, 100.0)
        slopes_H = (0.5 ** torch.arange(1, 1 + self.sizes.num_heads)).double() if self.alibi else None
        positions, witness, replay = Positions(rotary, slopes_H), Witness(), Replay()
        step = StepContext(KEY, witness=witness)
        y_TD, stats = layer(x_TD, (rows, S), positions, step, replay=replay)
        if self.recompute:
            y_TD, stats = layer(x_TD, (rows, S), positions, step, replay=replay)
        weight_TD = own(draw(1, B * S, D), cut.rank, cut.size)
        ((y_TD * weight_TD).sum() + stats.aux_loss / mesh.layout.dp).backward()
        grads = {name: param.grad for name, param in layer.named_parameters()}
        load, kept = stats.load_E.tolist(), stats.kept_E.tolist()
        aux = stats.aux_loss.detach()
        return Found(y_TD.detach(), x_TD.grad, witness, load, kept, aux, grads, stats.sent_bytes), layer

    @property
    def alone(self) -> Found:
        """The oracle."""
        return self.run(single_process_mesh(), dict(dispatch="local"))[0]

    def compare(self, whole: Found, mesh: Mesh, how: dict[str, Any]) -> None:
        found, layer = self.run(mesh, how)
        where = f"{mesh.layout} {mesh.sequence_parallel=} {how} {self}"
        cut = mesh.token_ranks if mesh.sequence_parallel else mesh.dp

        def same(name: str, actual: Tensor, expected: Tensor) -> None:
            torch.testing.assert_close(actual, expected, **FLOAT64, msg=lambda text: f"{name} {text}\n{where}")

        same("y", found.y_TD, own(whole.y_TD, cut.rank, cut.size))
        same("x", found.grad_x_TD, own(whole.grad_x_TD, cut.rank, cut.size))
        decided = (found.witness.experts_TK, found.witness.kept_TK)
        for mine, all_ranks in zip(decided, (whole.witness.experts_TK, whole.witness.kept_TK), strict=True):
            assert torch.equal(mine, own(all_ranks, mesh.rank, mesh.token_ranks.size)), where
        assert (found.load, found.kept) == (whole.load, whole.kept), where
        # Each tp rank adds the share of its slice, and dp ranks are averaged.
        same("aux", all_reduce(found.aux.clone(), mesh.world) / mesh.layout.dp, whole.aux)
        for name, param in layer.named_parameters():
            spec = spec_of(param)
            assert (spec.shard == "expert") == (mesh.ep.size > 1 and name.startswith("experts."))
            grad = all_reduce(found.grads[name].clone(), mesh.edp if spec.shard == "expert" else mesh.dp)
            expected = whole.grads[name].view(-1)[spec.flat_start : spec.flat_start + grad.numel()]
            same(name, grad.view(-1), expected)


def own(values: Tensor, rank: int, ranks: int) -> Tensor:
    return values.chunk(ranks)[rank]


def one_sided() -> Tensor:
    """Tokens that all want the same expert."""
    x_BSD = draw(0, B, S, D).abs() + 1
    x_BSD[..., 1:] *= 1e-3
    return x_BSD


CASES = [
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=0.75)),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=0.8, drop_policy="score", experts="loop"), recompute=True),
    Case(MoEConfig(num_experts=E, top_k=3, capacity_factor=1.0, drop_policy="random", overflow="reroute"), alibi=True),
    Case(
        MoEConfig(num_experts=E, top_k=2, capacity_factor=None, jitter=0.3), dict(window=3, clip_qkv=0.8, out_bias=True)
    ),
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=0.9), dict(dropout=0.4, backend="torch")),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=None, experts="bmm"), x_BSD=one_sided()),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=1.0), x_BSD=one_sided()),
    Case(MoEConfig(num_experts=E, top_k=2, capacity_factor=0.75), sizes=HeadSizes.of(D, 4, 2, P)),
    Case(MoEConfig(num_experts=E, top_k=1, capacity_factor=0.9), dict(clip_qkv=0.8), alibi=True, sizes=MORE_HEADS),
]


def check_layer() -> None:
    """Every layout of four ranks means what one process means: outputs, all gradients, what is dropped."""
    for number, case in enumerate(CASES):
        whole = case.alone
        assert (sum(whole.kept) < sum(whole.load)) == (case.moe.capacity_factor is not None), case
        for tp, sequence_parallel in ((1, False), (2, False), (2, True)):
            for ep in (1, 2, 4):
                for how, node_size in [(dict(dispatch="local"), None)] if ep == 1 else CARRIERS:
                    if number == 0 or how == dict(dispatch="all_to_all") or ep == 1:
                        mesh = replace(mesh_of(ep, tp, node_size), sequence_parallel=sequence_parallel)
                        case.compare(whole, mesh, how)


def check_ranks_without_tokens() -> None:
    """Dropless: every rank enters every exchange, and its gradients are zeros, not none."""
    for ep in (2, 4):
        mesh = mesh_of(ep)
        section = AttentionConfig(kind="switch", moe=MoEConfig(num_experts=E, capacity_factor=None))
        layer = SwitchAttention(SIZES, resolve_attention(section, SIZES, ep, "cpu"), mesh, 0)
        initialize(layer, seed=1)
        layer.double()
        rows = 0 if mesh.rank else 2
        x_TD = draw(0, rows * S, D).requires_grad_()
        y_TD, _ = layer(x_TD, (rows, S), Positions(rotary_table(torch.arange(S).double(), P, 100.0)), StepContext(KEY))
        y_TD.square().sum().backward()
        assert all(param.grad is not None for param in layer.parameters())
        used = all_reduce(layer.experts.w_query.grad.abs().sum(), mesh.ep)
        assert (float(used) > 0) == (0 in mesh.ep.ranks)


def check_trading_tokens_for_heads() -> None:
    """There and back is the identity; a rank's heads are its part of each token's numbers; gradients travel back."""
    mesh = mesh_of(1, 4)
    whole_TN = draw(0, 12, 8)
    mine_tN = own(whole_TN, mesh.tp.rank, 4).clone().requires_grad_()
    heads_Tn = tokens_to_heads(mine_tN, mesh.tp)
    assert torch.equal(heads_Tn, whole_TN[:, mesh.tp.rank * 2 : mesh.tp.rank * 2 + 2])
    assert torch.equal(heads_to_tokens(heads_Tn, mesh.tp), mine_tN)
    grad_TN = draw(1, 12, 8)
    heads_Tn.backward(grad_TN[:, mesh.tp.rank * 2 : mesh.tp.rank * 2 + 2])
    assert torch.equal(mine_tN.grad, own(grad_TN, mesh.tp.rank, 4))
    assert tokens_to_heads(torch.zeros(0, 8), mesh.tp).shape == (0, 2)
    assert heads_to_tokens(torch.zeros(0, 2), mesh.tp).shape == (0, 8)
    assert "cannot be cut into 4 equal parts" in raised(ValueError, tokens_to_heads, torch.zeros(3, 6), mesh.tp)


def check_faces() -> None:
    """The public layers with a mesh: outputs of two steps in training, with dropout and dropping."""
    for ep, tp in ((1, 1), (4, 1), (2, 2)):
        mesh = mesh_of(ep, tp)
        options = dict(dropout=0.2, capacity_factor=0.75, seed=3)
        x_BSD, ids_BS = draw(0, B, S, 8), (draw(1, B, S).abs() * 10).long() % 16
        part, whole = (
            SwitchMultiQueryAttention(8, 2, E, **options, mesh=m).double() for m in (mesh, single_process_mesh())
        )
        for _ in range(2):
            y_BSD, expected_BSD = part(own(x_BSD, mesh.dp.rank, mesh.dp.size)), whole(x_BSD)
            torch.testing.assert_close(y_BSD, own(expected_BSD, mesh.dp.rank, mesh.dp.size), **FLOAT64)
            assert torch.equal(part.expert_counts, whole.expert_counts)
        part, whole = (Transformer(8, 2, E, 2, 16, **options, mesh=m).double() for m in (mesh, single_process_mesh()))
        y_BSV, expected_BSV = part(own(ids_BS, mesh.dp.rank, mesh.dp.size)), whole(ids_BS)
        torch.testing.assert_close(y_BSV, own(expected_BSV, mesh.dp.rank, mesh.dp.size), **FLOAT64)
    assert "give a seed" in raised(ValueError, lambda: SwitchMultiQueryAttention(8, 2, E, mesh=mesh))
    message = raised(ValueError, lambda: SwitchMultiQueryAttention(8, 1, E, top_k=1, seed=0, mesh=mesh))
    assert "top_k*num_heads=1*1 query heads of a token are not divisible by tp=2" in message


def test_on_four_ranks() -> None:
    run_checks(4, [check_layer, check_ranks_without_tokens, check_trading_tokens_for_heads, check_faces])
