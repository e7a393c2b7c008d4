"""Auxiliary losses at the points where their value is known."""

from math import log

import pytest
import torch

from moe_dist.config.schema import MoEConfig
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.losses import balance_loss, crossing_rows, moe_stats, router_entropy, z_loss
from moe_dist.moe.routing import Routing
from moe_dist.parallel.mesh import Group
from tests.unit.helpers import context


def routing_of(logits_TE: torch.Tensor, top_k: int = 1) -> Routing:
    probs_TE = logits_TE.softmax(-1)
    experts_TK = probs_TE.topk(top_k).indices
    return Routing(logits_TE, probs_TE, experts_TK, probs_TE.gather(1, experts_TK))


def load(routing: Routing) -> torch.Tensor:
    return routing.experts_TK.flatten().bincount(minlength=routing.probs_TE.shape[1])


@pytest.mark.parametrize("peak", [0.1, 2.0, 50.0])
def test_perfect_balance_scores_one(peak: float) -> None:
    routing = routing_of(peak * torch.eye(4))
    assert load(routing).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(balance_loss(routing.probs_TE, load(routing)), torch.tensor(1.0))


def test_collapse_scores_the_number_of_experts() -> None:
    routing = routing_of(torch.tensor([[100.0, 0.0, 0.0, 0.0, 0.0]]).expand(6, 5))
    torch.testing.assert_close(balance_loss(routing.probs_TE, load(routing)), torch.tensor(5.0))


def test_balance_loss_by_hand() -> None:
    """f = (3/4, 1/4), P = (0.6, 0.4): 2 * (0.45 + 0.1) = 1.1."""
    probs_TE = torch.tensor([[0.5, 0.5], [0.7, 0.3]])
    torch.testing.assert_close(balance_loss(probs_TE, torch.tensor([3, 1])), torch.tensor(1.1))


def test_balance_loss_pushes_away_from_the_full_expert() -> None:
    """d loss / d logits is E * p * (f - <f, p>) / T: positive for an expert that has more than its share."""
    logits_TE = torch.tensor([[1.0, 0.0, -1.0]] * 4, requires_grad=True)
    routing = routing_of(logits_TE)
    balance_loss(routing.probs_TE, load(routing)).backward()
    probs = routing.probs_TE[0].detach()
    expected = 3 * probs * (torch.tensor([1.0, 0.0, 0.0]) - probs[0]) / 4
    torch.testing.assert_close(logits_TE.grad, expected.expand(4, 3))
    assert logits_TE.grad[0, 0] > 0.1


def test_z_loss_by_hand() -> None:
    # logsumexp(0, 0) = log 2; logsumexp(log 3, log 5) = log 8
    logits_TE = torch.tensor([[0.0, 0.0], [log(3), log(5)]])
    torch.testing.assert_close(z_loss(logits_TE), torch.tensor((log(2) ** 2 + log(8) ** 2) / 2))


def test_entropy() -> None:
    probs_TE = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(router_entropy(probs_TE), torch.tensor((log(4) + 0.0 + log(2)) / 3))


def test_rows_that_cross_between_ranks_by_hand() -> None:
    """4 ranks, 4 experts. ep = 2: ranks 0 and 2 hold experts 0, 1; ranks 1 and 3 hold 2, 3. ep = 4: rank i holds i."""
    kept_WE = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 0, 0, 2], [0, 0, 9, 0]])
    assert crossing_rows(kept_WE, 1).item() == 0
    assert crossing_rows(kept_WE, 2).item() == (3 + 4) + (5 + 6) + (0 + 2) + (0 + 0)
    assert crossing_rows(kept_WE, 4).item() == (2 + 3 + 4) + (5 + 7 + 8) + (1 + 0 + 2) + 9


@pytest.mark.parametrize("tp", [1, 2])
def test_statistics_of_a_layer(tp: int) -> None:
    """5 tokens on expert 0 and 1 on expert 1, of which C = ceil(0.5 * 6 / 2) = 2 and 1 stay."""
    logits_TE = torch.tensor([[2.0, 0.0]] * 5 + [[0.0, 1.0]], requires_grad=True)
    moe = MoEConfig(num_experts=2, top_k=1, capacity_factor=0.5, balance_loss_coef=0.5, z_loss_coef=0.25)
    routing = routing_of(logits_TE)
    plan = Capacity(moe, 7, Group())(routing, context())
    stats = moe_stats(moe, 7, routing, plan, tp, ep=1)
    assert stats.layer == 7
    assert stats.load_E.tolist() == [5, 1]  # before dropping
    assert stats.kept_E.tolist() == [2, 1]
    assert stats.crossing.item() == 0  # ep = 1: all experts are here
    balance, z = balance_loss(routing.probs_TE, torch.tensor([5, 1])), z_loss(logits_TE)
    torch.testing.assert_close(stats.balance_loss, balance.detach())
    torch.testing.assert_close(stats.z_loss, z.detach())
    torch.testing.assert_close(stats.aux_loss, (0.5 * balance + 0.25 * z) / tp)
    assert stats.aux_loss.requires_grad
    assert not any(tensor.requires_grad for tensor in (stats.balance_loss, stats.z_loss, stats.entropy))
    stats.aux_loss.backward()
    assert logits_TE.grad.abs().min() > 0
