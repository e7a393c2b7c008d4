"""Each router against its paper's equation, written out token by token."""

from math import exp, log1p

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from moe_dist.moe.routers import cv_squared, limit_groups, sinkhorn
from tests.unit.helpers import context
from tests.unit.moe.test_router import D, E, T, probs, routed, router, tokens


def test_jitter_multiplies_the_input_by_keyed_numbers() -> None:
    made = router(jitter=0.3)
    index_TD = torch.arange(T * D).view(T, D)
    factor_TD = 0.7 + 0.6 * context().key.fold("jitter", 0).uniform(index_TD)
    routing = routed(made)
    torch.testing.assert_close(routing.logits_TE, (tokens() * factor_TD).float() @ made.weight.t())
    assert float(factor_TD.detach().min()) >= 0.7 and float(factor_TD.max()) < 1.3 and float(factor_TD.std()) > 0.15
    torch.testing.assert_close(routed(made, phase="eval").logits_TE, tokens() @ made.weight.t())


@pytest.mark.parametrize("kind", ["softmax", "noisy"])
def test_noise_follows_the_token_not_the_rank(kind: str) -> None:
    """The second of two ranks draws what a single process draws for the second half of the tokens."""
    from moe_dist.parallel.mesh import Group

    made = router(kind, **({"jitter": 0.1} if kind == "softmax" else {}))
    whole = routed(made)
    made.token_ranks = Group((0, 1), 1)
    index = made.draw_index(tokens()[T // 2 :])
    assert torch.equal(index, torch.arange(T * D).view(T, D)[T // 2 :])
    if kind == "softmax":
        half = routed(made, tokens()[T // 2 :])
        assert torch.equal(half.logits_TE, whole.logits_TE[T // 2 :])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_learned_bias_is_part_of_the_logits(kind: str) -> None:
    """Unlike a balancing bias it changes weights too, and has the gradient of the logits, summed over tokens."""
    made = router(kind, router_bias=True)
    with torch.no_grad():
        made.logit_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 3.0]))
    routing = routed(made)
    torch.testing.assert_close(routing.logits_TE, tokens() @ made.weight.t() + made.logit_bias)
    score_TE = routing.logits_TE.softmax(-1) if kind == "softmax" else routing.logits_TE.sigmoid()
    best_TK = score_TE.topk(2).indices
    weights_TK = score_TE.gather(1, best_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK / weights_TK.sum(-1, keepdim=True))
    assert (best_TK == 3).any(-1).sum() > (probs(made).topk(2).indices == 3).any(-1).sum()
    (grad_E,) = torch.autograd.grad(routing.weights_TK[:, 0].sum(), made.logit_bias, retain_graph=True)
    (grad_TE,) = torch.autograd.grad(routing.weights_TK[:, 0].sum(), routing.logits_TE)
    torch.testing.assert_close(grad_E, grad_TE.sum(0))


def test_sigmoid_chooses_with_its_bias_and_weighs_without() -> None:
    made = router("sigmoid", top_k=2, renormalize=False)
    made.bias_E.copy_(torch.tensor([0.0, 5.0, -5.0, 0.0]))
    routing = routed(made)
    assert (routing.experts_TK[:, 0] == 1).all() and (routing.experts_TK != 2).all()
    score_TE = (tokens() @ made.weight.t()).sigmoid()
    torch.testing.assert_close(routing.weights_TK, score_TE.gather(1, routing.experts_TK))


def test_the_bias_moves_against_the_load_once_a_step() -> None:
    made = router("sigmoid", bias_update_rate=0.25)
    made.balance(torch.tensor([10, 2, 4, 0]))  # the mean is 4
    assert made.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.25]
    made.balance(torch.tensor([0, 0, 0, 16]))
    assert made.bias_E.tolist() == [0.0, 0.5, 0.25, 0.0]


def test_bias_balances_a_skewed_load() -> None:
    made = router("sigmoid", top_k=1, bias_update_rate=0.01)
    with torch.no_grad():
        made.weight[0] += 0.5
    x_TD = tokens(512).abs()
    before = routed(made, x_TD).stats.counts_QE[0]
    for _ in range(300):
        made.balance(routed(made, x_TD).stats.counts_QE[0])
    after = routed(made, x_TD).stats.counts_QE[0]
    assert before.max() > 300 and after.max() < 170


def shazeer(made: object, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, importance loss, load loss) of equations 3 to 11, expert by expert."""
    clean = (x_TD @ made.weight.t()).tolist()
    spread = (x_TD @ made.noise_weight.t()).tolist()
    noise = context().key.fold("noise", 0).normal(torch.arange(len(x_TD) * E)).view(-1, E).tolist()
    gates, load = torch.zeros(len(x_TD), E), torch.zeros(E)
    for t in range(len(x_TD)):
        std = [max(log1p(exp(s)), 0.01) for s in spread[t]]
        noisy = [c + n * s for c, n, s in zip(clean[t], noise[t], std, strict=True)]
        chosen = sorted(range(E), key=lambda e, noisy=noisy: -noisy[e])[:2]
        gates[t, chosen] = torch.tensor([noisy[e] for e in chosen]).softmax(0)
        for e in range(E):
            others = sorted((noisy[i] for i in range(E) if i != e), reverse=True)
            load[e] += Normal(0.0, 1.0).cdf(torch.tensor((clean[t][e] - others[1]) / std[e]))
    spreads = [(v.var(unbiased=False) / v.mean() ** 2) for v in (gates.sum(0), load)]
    return gates, *spreads


def test_noisy_top_k_is_shazeers() -> None:
    made = router("noisy", importance_loss_coef=0.5, load_loss_coef=0.25)
    with torch.no_grad():
        made.noise_weight.normal_(generator=torch.Generator().manual_seed(3))
    gates_TE, importance, load = shazeer(made, tokens())
    routing = routed(made)
    torch.testing.assert_close(torch.zeros(T, E).scatter(1, routing.experts_TK, routing.weights_TK), gates_TE)
    torch.testing.assert_close(routing.extra_loss, 0.5 * importance + 0.25 * load, rtol=1e-4, atol=1e-6)
    routing.extra_loss.backward()
    assert made.weight.grad.abs().max() > 1e-4 and made.noise_weight.grad.abs().max() > 1e-5
    assert torch.equal(routed(made, phase="eval").logits_TE, tokens() @ made.weight.t())


@pytest.mark.parametrize("raw", [-1000.0, -110.0, -60.0, -43.7, -20.0, -4.7, -4.5, 0.0, 30.0])
def test_noise_that_has_died_out_leaves_finite_gradients(raw: float) -> None:
    """Raw deviations near `raw`: the gradients of equations 3 to 11 in float64, with a deviation of at least 0.01."""
    made, x_TD = router("noisy", importance_loss_coef=0.5, load_loss_coef=0.25), tokens()
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        made.noise_weight[:, 0] = raw
    routed(made, x_TD).extra_loss.backward()
    weight, noise_weight = (p.detach().double().requires_grad_() for p in (made.weight, made.noise_weight))
    clean_TE, raw_TE = x_TD.double() @ weight.t(), x_TD.double() @ noise_weight.t()
    std_TE = raw_TE.exp().log1p()
    std_TE = std_TE + (0.01 - std_TE.detach()).clamp(min=0)
    noisy_TE = clean_TE + context().key.fold("noise", 0).normal(torch.arange(T * E)).view(T, E) * std_TE
    gates_E, load_E = torch.zeros(2, E, dtype=torch.float64).unbind()
    for t in range(T):
        best = noisy_TE[t].argsort(descending=True)
        gates_E = gates_E.index_add(0, best[:2], noisy_TE[t, best[:2]].softmax(0))
        beaten = torch.stack([noisy_TE[t, best[2 if e in best[:2] else 1]] for e in range(E)])
        load_E = load_E + torch.special.ndtr((clean_TE[t] - beaten) / std_TE[t])
    (0.5 * cv_squared(gates_E) + 0.25 * cv_squared(load_E)).backward()
    for grad, expected in ((made.weight.grad, weight.grad), (made.noise_weight.grad, noise_weight.grad)):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-12)


def test_coefficient_of_variation() -> None:
    assert float(cv_squared(torch.full((5,), 3.0))) == 0.0
    torch.testing.assert_close(cv_squared(torch.tensor([8.0, 0.0, 0.0, 0.0])), torch.tensor(3.0))


def test_expert_choice_offers_every_token_to_every_expert() -> None:
    made = router("expert_choice")
    routing = routed(made)
    assert routing.experts_TK.tolist() == [[0, 1, 2, 3]] * T
    assert torch.equal(routing.weights_TK, probs(made))


def test_sinkhorn_makes_rows_and_columns_even() -> None:
    logits_TE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    share_TE = sinkhorn(logits_TE, 100).exp()
    torch.testing.assert_close(share_TE.sum(0), torch.full((5,), 1 / 5, dtype=torch.float64))
    torch.testing.assert_close(share_TE.sum(1), torch.full((40,), 1 / 40, dtype=torch.float64))
    # Only rows and columns were scaled: cross ratios stay.
    ratio = share_TE[0, 0] * share_TE[1, 1] / (share_TE[0, 1] * share_TE[1, 0])
    torch.testing.assert_close(ratio.log(), logits_TE[0, 0] + logits_TE[1, 1] - logits_TE[0, 1] - logits_TE[1, 0])


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_balances_in_training_and_weighs_by_the_logits(top_k: int) -> None:
    made = router("sinkhorn", top_k, sinkhorn_iterations=30)
    with torch.no_grad():
        made.weight[0] += 2.0
    x_TD = tokens(256).abs()
    even, greedy = routed(made, x_TD).stats.counts_QE[0], routed(made, x_TD, phase="eval").stats.counts_QE[0]
    assert even.max() < 0.7 * greedy.max()
    routing = routed(made, x_TD)
    score = routing.logits_TE.sigmoid() if top_k == 1 else routing.logits_TE.softmax(-1)
    chosen = score.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, chosen if top_k == 1 else chosen / chosen.sum(-1, keepdim=True))


def test_hash_sends_equal_ids_to_equal_experts() -> None:
    made, ids_T = router("hash"), torch.arange(1000) % 250
    routing = routed(made, torch.zeros(1000, D), token_ids_T=ids_T)
    assert torch.equal(routing.experts_TK[:250], routing.experts_TK[250:500])
    assert (routing.experts_TK.diff(dim=-1) != 0).all() and routing.weights_TK.unique().tolist() == [0.5]
    assert routing.stats.counts_QE.max() < 1.3 * 500
    assert list(made.parameters()) == []
    with pytest.raises(ValueError, match="router=hash needs the id of every token"):
        routed(made, token_ids_T=None)


def test_adding_a_hashed_expert_moves_only_its_own_tokens() -> None:
    ids_T = torch.arange(200)
    before, after = (
        routed(router("hash", 1, num_experts), torch.zeros(200, D), token_ids_T=ids_T).experts_TK[:, 0]
        for num_experts in (4, 5)
    )
    moved = before != after
    assert 0 < moved.sum() < 80 and (after[moved] == 4).all()


@pytest.mark.parametrize(("kind", "best_of"), [("softmax", 1), ("sigmoid", 2)])
def test_groups_limit_the_choice(kind: str, best_of: int) -> None:
    made = router(kind, 3, num_experts=12, num_groups=4, top_k_groups=2)
    routing = routed(made)
    logits_TE = tokens() @ made.weight.t()
    score_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(-1)
    for t, scores in enumerate(score_TE.tolist()):
        groups = [sorted(scores[3 * g : 3 * g + 3], reverse=True) for g in range(4)]
        open_groups = sorted(range(4), key=lambda g, groups=groups: -sum(groups[g][:best_of]))[:2]
        allowed = [e for e in range(12) if e // 3 in open_groups]
        expected = sorted(allowed, key=lambda e, scores=scores: -scores[e])[:3]
        assert routing.experts_TK[t].tolist() == expected
    assert len({tuple(row) for row in (routing.experts_TK // 3).tolist()}) > 3


def test_one_group_changes_nothing() -> None:
    scores = torch.rand(3, 4)
    assert limit_groups(scores, 1, 1, 1) is scores
