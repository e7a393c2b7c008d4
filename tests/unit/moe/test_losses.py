"""Auxiliary losses at the points where their value is known."""

from math import log

import pytest
import torch

from moe_dist.config.model import MoEConfig
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.choice import Choice, Routing
from moe_dist.moe.losses import MoEStats, balance_loss
from moe_dist.moe.router import Router
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.step import Site, StepContext
from tests.unit.helpers import context


def router_of(moe: MoEConfig, tp: int = 1) -> Router:
    """A router that only knows its config and its tp rank."""
    router = Router(moe, 8, Site(7), single_process_mesh())
    router.slices = Group(tuple(range(tp)), tp - 1)
    return router


def routing_of(logits_TE: torch.Tensor, top_k: int = 1, router: Router | None = None, **step: object) -> Routing:
    router = router or router_of(MoEConfig(num_experts=logits_TE.shape[1], top_k=top_k))
    return router.choose(logits_TE, StepContext(context().key, **step), None)


def balance(routing: Routing) -> torch.Tensor:
    return balance_loss(routing.stats.prob_sums_QE, routing.stats.counts_QE, len(routing.experts_TK))


@pytest.mark.parametrize("peak", [0.1, 2.0, 50.0])
def test_perfect_balance_scores_one(peak: float) -> None:
    routing = routing_of(peak * torch.eye(4))
    assert routing.stats.counts_QE.tolist() == [[1, 1, 1, 1]]
    torch.testing.assert_close(balance(routing), torch.tensor(1.0))


def test_collapse_scores_the_number_of_experts() -> None:
    routing = routing_of(torch.tensor([[100.0, 0.0, 0.0, 0.0, 0.0]]).expand(6, 5))
    torch.testing.assert_close(balance(routing), torch.tensor(5.0))


def test_balance_loss_by_hand() -> None:
    """f = (3/4, 1/4), P = (0.6, 0.4): 2 * (0.45 + 0.1) = 1.1."""
    sums_QE = torch.tensor([[0.5, 0.5]]) + torch.tensor([[0.7, 0.3]])
    torch.testing.assert_close(balance_loss(sums_QE, torch.tensor([[3, 1]]), 2), torch.tensor(1.1))


def test_balance_loss_is_exact_in_float64() -> None:
    """f = (1/3, 2/3), P = (0.9, 0.1): 2 * (0.3 + 0.2 / 3) = 11 / 15. Thirds are not what fp32 divides to."""
    sums_QE = torch.tensor([[2.7, 0.3]], dtype=torch.float64)
    assert float(balance_loss(sums_QE, torch.tensor([[1, 2]]), 3)) == pytest.approx(11 / 15, rel=1e-15)


def test_balance_loss_pushes_away_from_the_full_expert() -> None:
    """d loss / d logits is E * p * (f - <f, p>) / T: positive for an expert that has more than its share."""
    logits_TE = torch.tensor([[1.0, 0.0, -1.0]] * 4, requires_grad=True)
    balance(routing_of(logits_TE)).backward()
    probs = logits_TE[0].detach().softmax(-1)
    expected = 3 * probs * (torch.tensor([1.0, 0.0, 0.0]) - probs[0]) / 4
    torch.testing.assert_close(logits_TE.grad, expected.expand(4, 3))
    assert logits_TE.grad[0, 0] > 0.1


def stats_of(moe: MoEConfig, logits_TE: torch.Tensor, tp: int = 1, **step: object) -> MoEStats:
    router, where = router_of(moe, tp), StepContext(context().key, **step)
    routing = router.choose(logits_TE, where, None)
    plan = Capacity(moe, Site(7), Group())(routing, where)
    return MoEStats.of(Choice(routing, plan, routing.weights_TK), router, where, sent_bytes=11)


def test_z_loss_and_entropy_by_hand() -> None:
    # logsumexp(0, 0) = log 2; logsumexp(log 3, log 5) = log 8
    logits_TE = torch.tensor([[0.0, 0.0], [log(3), log(5)]])
    stats = stats_of(MoEConfig(num_experts=2, top_k=1), logits_TE)
    torch.testing.assert_close(stats.z_loss, torch.tensor((log(2) ** 2 + log(8) ** 2) / 2))
    entropy = -(3 / 8 * log(3 / 8) + 5 / 8 * log(5 / 8))
    torch.testing.assert_close(stats.entropy, torch.tensor((log(2) + entropy) / 2))


@pytest.mark.parametrize("tp", [1, 2])
def test_statistics_of_a_layer(tp: int) -> None:
    """5 tokens on expert 0 and 1 on expert 1, of which C = ceil(0.5 * 6 / 2) = 2 and 1 stay."""
    logits_TE = torch.tensor([[2.0, 0.0]] * 5 + [[0.0, 1.0]], requires_grad=True)
    moe = MoEConfig(num_experts=2, top_k=1, capacity_factor=0.5, balance_loss_coef=0.5, z_loss_coef=0.25)
    stats = stats_of(moe, logits_TE, tp)
    assert stats.site == Site(7)
    assert stats.load_E.tolist() == [5, 1]  # before dropping
    assert stats.kept_E.tolist() == [2, 1]
    assert stats.sent_bytes == 11
    torch.testing.assert_close(stats.unserved, torch.tensor(0.5))
    share, probs = torch.tensor([5.0, 1.0]) / 6, logits_TE.softmax(-1).mean(0)
    loss = 2 * (share * probs).sum()
    torch.testing.assert_close(stats.balance_loss, loss.detach())
    torch.testing.assert_close(stats.aux_loss, (0.5 * loss + 0.25 * stats.z_loss) / tp)
    assert not any(tensor.requires_grad for tensor in (stats.balance_loss, stats.z_loss, stats.entropy))
    stats.aux_loss.backward()
    assert logits_TE.grad.abs().min() > 0


def one_by_one(logits_TE: torch.Tensor, chunks: list[slice]) -> torch.Tensor:
    """The mean over chunks of the loss of each alone, weighed by its tokens."""
    losses = [balance(routing_of(logits_TE[c])) * len(logits_TE[c]) for c in chunks]
    return torch.stack(losses).sum() / len(logits_TE)


def test_balancing_scopes() -> None:
    logits_TE = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * 3
    thirds, halves = [slice(i, i + 4) for i in (0, 4, 8)], [slice(0, 6), slice(6, 12)]

    def loss(scope: str, **step: object) -> torch.Tensor:
        moe = MoEConfig(num_experts=4, top_k=1, balance_scope=scope)
        return stats_of(moe, logits_TE, seq_len=4, **step).balance_loss

    torch.testing.assert_close(loss("global"), one_by_one(logits_TE, [slice(0, 12)]))
    torch.testing.assert_close(loss("sequence"), one_by_one(logits_TE, thirds))
    torch.testing.assert_close(loss("local"), loss("global"))
    torch.testing.assert_close(loss("local", parts=2), one_by_one(logits_TE, halves))
    assert len({round(float(loss(s, parts=2)), 4) for s in ("global", "sequence", "local")}) == 3
