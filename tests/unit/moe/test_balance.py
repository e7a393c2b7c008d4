"""Balancing by quantiles: against the exact quantile in float64, what it promises, and what others got wrong."""

from collections.abc import Callable
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dist.engine.base import RouterLoads
from moe_dist.engine.native import NativeEngine
from moe_dist.kernels.top_k.reference import best
from moe_dist.models.decoder import Decoder
from moe_dist.moe.balance import Tally, needs_histogram, quantile_bias
from moe_dist.moe.gate import Gate
from moe_dist.moe.router import Router
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import RealTokens
from moe_dist.surgery.layers import split_experts
from tests.unit.helpers import context, random_ids, tiny_model
from tests.unit.moe.test_router import D, routed, router, tokens
from tests.unit.surgery.helpers import layer_of, run

BIASED = ["softmax", "sigmoid"]


def exact(scores_TE: np.ndarray, bias_E: np.ndarray, top_k: int) -> np.ndarray:
    """Token by token, expert by expert: minus the quantile 1 - k/E of what an expert's score is above a token's
    threshold, centred; float64."""
    num_experts = len(bias_E)
    above = np.empty_like(scores_TE)
    for t, scores in enumerate(scores_TE):
        alpha = sorted(scores + bias_E, reverse=True)[top_k]
        above[t] = scores - alpha
    share = 1 - top_k / num_experts
    beta = np.array([np.quantile(above[:, e], share, method="inverted_cdf") for e in range(num_experts)])
    return -beta + beta.mean()


@pytest.mark.parametrize("seed", range(100))
def test_the_bias_is_the_exact_quantile_within_a_bin(seed: int) -> None:
    draw = np.random.default_rng(seed)
    num_experts = int(draw.integers(2, 40))
    top_k, count = int(draw.integers(1, num_experts)), int(draw.choice([97, 499, 2003]))  # no multiple of experts
    logits_TE = torch.tensor(draw.normal(size=(count, num_experts)) * draw.uniform(0.1, 4), dtype=torch.float32)
    scores_TE = logits_TE.sigmoid() if seed % 2 else logits_TE.softmax(-1)
    bias_E = torch.tensor(draw.normal(size=num_experts) * draw.uniform(0, 0.3), dtype=torch.float32)
    preference_TE = scores_TE + bias_E
    needs_EB = needs_histogram(preference_TE, best(preference_TE, top_k), bias_E, 1000)
    assert needs_EB.dtype == torch.int64 and needs_EB.sum(1).tolist() == [count] * num_experts
    found_E = quantile_bias(needs_EB, bias_E, torch.ones(num_experts), top_k)
    expected_E = exact(scores_TE.double().numpy(), bias_E.double().numpy(), top_k)
    off_E = found_E.double().numpy() - expected_E
    bin_width = float(bias_E.max() - bias_E.min() + 2) / 1000
    assert (off_E.max() - off_E.min()) / 2 <= bin_width * (1 + 1e-4)  # each of them, before they are centred
    assert abs(float(found_E.sum())) < 1e-5


def test_between_the_edges_of_a_bin_the_quantile_is_interpolated() -> None:
    """Two experts, bias 0, so bins of 2/10 from -1. Expert 0 has 4 tokens in bin 6: its median is in the middle of it;
    expert 1 has 1 token in bin 2 and 3 in bin 3, so that 2 of 4 are up to a third of that."""
    needs_EB = torch.zeros(2, 10, dtype=torch.int64)
    needs_EB[0, 6], needs_EB[1, 2], needs_EB[1, 3] = 4, 1, 3
    found_E = quantile_bias(needs_EB, torch.zeros(2), torch.ones(2), top_k=1)
    zeroth, first = -1 + 0.2 * 6.5, -1 + 0.2 * (3 + 1 / 3)
    torch.testing.assert_close(found_E, torch.tensor([(zeroth - first) / 2, (first - zeroth) / 2]))


def skewed(kind: str, num_experts: int = 32, top_k: int = 4, **moe: object) -> Router:
    """Whose experts are wanted very unequally by tokens with a large first number."""
    made = router(kind, top_k, num_experts, **moe)
    with torch.no_grad():
        made.weight[:, 0] = torch.randn(num_experts, generator=torch.Generator().manual_seed(5))
    return made


def wanting(seed: int, count: int = 8192) -> Tensor:
    x_TD = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    x_TD[:, 0] = 1.0
    return x_TD


def worst(made: Router, x_TD: Tensor) -> float:
    """Highest load over the mean."""
    load_E = routed(made, x_TD, phase="eval").stats.counts_QE[0].double()
    return float(load_E.max() / load_E.mean())


def stationary(kind: str, **moe: object) -> tuple[Router, Callable[[int], Tensor]]:
    """A router whose logits are its input, and batches with independent logits about unequal means of 32 experts."""
    made = router(kind, 4, 32, d_model=32, **moe)
    with torch.no_grad():
        made.weight.copy_(torch.eye(32))
    mean_E = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return made, lambda seed: mean_E + torch.randn(8192, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "bins"), [("sigmoid", 1000), ("softmax", 1000), ("softmax", 10_000)])
def test_stationary_scores_are_balanced_at_once(kind: str, bins: int) -> None:
    made, batch = stationary(kind, balance="quantile", balance_bins=bins)
    heights = [worst(made, batch(100))]
    for step in range(4):
        routing = routed(made, batch(step))
        made.balance(routing.stats.counts_QE[0], routing.needs_EB)
        heights.append(worst(made, batch(100)))
    assert heights[0] > 4 and heights[1] < 1.75 and heights[2] < 1.2 and heights[4] < 1.15, heights
    slow, batch = stationary(kind, balance="sign")
    for step in range(4):
        slow.balance(routed(slow, batch(step)).stats.counts_QE[0])
    assert worst(slow, batch(100)) > 3


@pytest.mark.parametrize("kind", BIASED)
def test_weights_are_of_the_scores_without_the_bias(kind: str) -> None:
    made = router(kind, top_k=2, balance="quantile", renormalize=False)
    made.bias_E.copy_(torch.tensor([0.0, 5.0, -5.0, 0.0]))
    routing = routed(made)
    assert (routing.experts_TK[:, 0] == 1).all() and (routing.experts_TK != 2).all()
    logits_TE = tokens() @ made.weight.t()
    score_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(-1)
    torch.testing.assert_close(routing.weights_TK, score_TE.gather(1, routing.experts_TK))
    routing.weights_TK.sum().backward()
    assert made.weight.grad.abs().max() > 1e-4


# The mistakes of others, one by one (with ranks of a tp group: tests/dist/test_balance.py).


@pytest.mark.parametrize("kind", BIASED)
def test_evaluation_counts_nothing(kind: str) -> None:
    made = skewed(kind, balance="quantile")
    assert routed(made, wanting(0)).needs_EB is not None
    for phase in ("eval", "dropless"):
        assert routed(made, wanting(0), phase=phase).needs_EB is None


def engine_of(**changes: object) -> NativeEngine:
    from moe_dist.config.schema import EngineConfig, OptimConfig

    model = Decoder(tiny_model(balance="quantile", **changes), single_process_mesh(), seed=1)
    return NativeEngine(model, single_process_mesh(), EngineConfig(), OptimConfig(), accumulation=2)


def counted(engine: NativeEngine, watch: pytest.MonkeyPatch) -> list[Tally]:
    """What the routers are told after two micro-steps of 3 x 8 tokens, with an evaluation between them."""
    told: list[Tally] = []
    watch.setattr(Router, "balance", lambda router, *tally: None)
    for layer in engine.model.blocks:
        watch.setattr(layer.feed_forward.router, "balance", lambda *tally: told.append(Tally(*tally)), raising=False)
    for micro in range(2):
        ids = random_ids(3, 9, seed=micro)
        engine.micro_step(ids[:, :-1], ids[:, 1:], context(micro))
        engine.evaluate(ids[:, :-1], ids[:, 1:], context(phase="eval"), "token_losses")
    engine.update(1e-3)
    return told


@pytest.mark.parametrize("kind", BIASED)
def test_a_block_that_runs_again_counts_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does each micro-step, without the evaluation."""
    plain, again = (counted(engine_of(router=kind, recompute=way), monkeypatch) for way in ("none", "block"))
    assert len(plain) == len(again) == 2
    for one, other in zip(plain, again, strict=True):
        assert one.needs_EB.sum(1).tolist() == [2 * 3 * 8] * 4
        assert torch.equal(one.needs_EB, other.needs_EB) and torch.equal(one.load_E, other.load_E)


@pytest.mark.parametrize("kind", BIASED)
def test_evaluation_chooses_by_the_same_sign_of_the_bias(kind: str) -> None:
    made = skewed(kind, balance="quantile")
    made.bias_E.copy_(torch.linspace(-0.2, 0.2, 32))
    x_TD = wanting(0, 64)
    train, evaluation = routed(made, x_TD), routed(made, x_TD, phase="dropless")
    logits_TE = x_TD @ made.weight.t()
    score_TE = logits_TE.sigmoid() if kind == "sigmoid" else logits_TE.softmax(-1)
    expected_TK = (score_TE + made.bias_E).topk(4).indices
    assert torch.equal(train.experts_TK, evaluation.experts_TK)
    assert torch.equal(train.experts_TK.sort(-1).values, expected_TK.sort(-1).values)


@pytest.mark.parametrize("kind", BIASED)
def test_padding_does_not_count(kind: str) -> None:
    made, x_TD = skewed(kind, balance="quantile"), wanting(0, 60)
    mask_T = torch.arange(60) % 3 > 0
    routing = routed(made, x_TD, real=RealTokens(mask_T, int(mask_T.sum())))
    assert routing.needs_EB.sum(1).tolist() == [40] * 32
    assert torch.equal(routing.needs_EB, routed(made, x_TD[mask_T]).needs_EB)
    nothing = routed(made, x_TD, real=RealTokens(torch.zeros(60, dtype=torch.bool), 0))
    made.bias_E.copy_(torch.linspace(-0.1, 0.1, 32))
    made.balance(nothing.stats.counts_QE[0], nothing.needs_EB)
    assert torch.equal(made.bias_E, torch.linspace(-0.1, 0.1, 32))


# State, closed experts, options.


@pytest.mark.parametrize("kind", BIASED)
def test_order_and_cut_of_the_tokens_change_no_bit(kind: str) -> None:
    whole, parts = skewed(kind, balance="quantile"), skewed(kind, balance="quantile")
    x_TD, order_T = wanting(0, 999), torch.randperm(999, generator=torch.Generator().manual_seed(1))
    needs_EB = routed(whole, x_TD).needs_EB
    tallies = [Tally(r.stats.counts_QE[0], r.needs_EB) for r in (routed(parts, p) for p in x_TD[order_T].split(100))]
    total = sum(tallies[1:], start=tallies[0])
    assert torch.equal(total.needs_EB, needs_EB)
    whole.balance(total.load_E, needs_EB)
    parts.balance(total.load_E, total.needs_EB)
    assert torch.equal(whole.bias_E, parts.bias_E) and whole.bias_E.abs().max() > 0.01


@pytest.mark.parametrize("kind", BIASED)
def test_closed_experts_take_no_part_and_rest(kind: str) -> None:
    """As a router of the open ones alone."""
    open_e = [0, 1, 3, 4, 7]
    made = skewed(kind, num_experts=8, top_k=2, balance="quantile")
    gate = Gate(made.moe, D, 0, single_process_mesh())
    gate.router.load_state_dict(made.state_dict())
    gate.router.bias_E.copy_(torch.linspace(-0.4, 0.4, 8))
    gate.router.open_E[[2, 5, 6]] = 0.0
    small = router(kind, 2, 5, balance="quantile")
    with torch.no_grad():
        small.weight.copy_(made.weight[open_e])
        small.bias_E.copy_(gate.router.bias_E[open_e])
    routing, expected = gate.routing(wanting(0, 500), context()), routed(small, wanting(0, 500))
    assert torch.equal(routing.needs_EB[open_e], expected.needs_EB) and not routing.needs_EB[[2, 5, 6]].any()
    before = gate.router.bias_E.clone()
    gate.router.balance(routing.stats.counts_QE[0], routing.needs_EB)
    small.balance(expected.stats.counts_QE[0], expected.needs_EB)
    assert torch.equal(gate.router.bias_E[open_e], small.bias_E)
    assert torch.equal(gate.router.bias_E[[2, 5, 6]], before[[2, 5, 6]])


def test_where_all_open_experts_are_chosen_nothing_is_needed() -> None:
    made = skewed("sigmoid", num_experts=4, top_k=2, balance="quantile")
    made.bias_E.copy_(torch.linspace(-0.4, 0.4, 4))
    gate = Gate(made.moe, D, 0, single_process_mesh())
    gate.router.load_state_dict(made.state_dict())
    gate.router.open_E[[1, 2]] = 0.0
    routing = gate.routing(wanting(0, 50), context())
    assert not routing.needs_EB.any()
    gate.router.balance(routing.stats.counts_QE[0], routing.needs_EB)
    assert torch.equal(gate.router.bias_E, made.bias_E)


def test_the_moving_average_keeps_its_share_of_the_old() -> None:
    plain, slow = (skewed("sigmoid", balance="quantile", balance_ema=ema) for ema in (0.0, 0.75))
    old_E = torch.linspace(-0.1, 0.1, 32)
    for made in (plain, slow):
        made.bias_E.copy_(old_E)
        routing = routed(made, wanting(0))
        made.balance(routing.stats.counts_QE[0], routing.needs_EB)
    torch.testing.assert_close(slow.bias_E, 0.75 * old_E + 0.25 * plain.bias_E)


@pytest.mark.parametrize(
    ("kind", "balance", "biased"),
    [
        ("softmax", "auto", False),
        ("softmax", "loss", False),
        ("softmax", "sign", True),
        ("softmax", "loss+quantile", True),
        ("sigmoid", "auto", True),
        ("sigmoid", "none", True),
        ("noisy", "none", False),
    ],
)
def test_which_routers_have_a_bias_and_a_loss(kind: str, balance: str, biased: bool) -> None:
    """A softmax without one has no more in its checkpoints than before; a sigmoid keeps the one that it was given."""
    made = layer_of(router=kind, balance=balance, z_loss_coef=0.0)
    assert ("bias_E" in dict(made.router.named_buffers())) == biased
    _, stats = run(made)
    others = 0.0 if kind != "noisy" else float(stats.aux_loss.detach())
    expected = 1e-2 * float(stats.balance_loss) if balance == "auto" or "loss" in balance else others
    assert float(stats.aux_loss.detach()) == pytest.approx(expected)


@pytest.mark.parametrize("kind", BIASED)
def test_the_parts_of_a_split_expert_are_chosen_as_it_was(kind: str) -> None:
    layer = layer_of(router=kind, balance="sign")
    before, _ = run(layer)
    split_experts(layer, 2)
    torch.testing.assert_close(run(layer)[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BIASED)
def test_histograms_do_not_leave_the_step(kind: str) -> None:
    """The engine keeps sums alone: what it hands on has no histogram for each micro-step."""
    engine = engine_of(router=kind)
    ids = random_ids(3, 9)
    output = engine.micro_step(ids[:, :-1], ids[:, 1:], context())
    assert all(stats.needs_EB is None for stats in output.stats)
    held = [tally.needs_EB for tally in engine.loads.by_site.values()]
    assert [tuple(needs_EB.shape) for needs_EB in held] == [(4, 1000)] * 2
    engine.discard()
    assert engine.loads.by_site == RouterLoads().by_site


@pytest.mark.parametrize("work", ["count", "set"])
def test_nothing_waits_for_the_host(work: str) -> None:
    """Under fake tensors anything whose shape or path depends on data is an error."""
    with FakeTensorMode():
        bias_E, open_E = torch.zeros(8), torch.ones(8)
        preference_TE, experts_TK = torch.rand(64, 8), torch.zeros(64, 2, dtype=torch.int64)
        do: dict[str, Callable[[], Tensor]] = {
            "count": lambda: needs_histogram(preference_TE, experts_TK, bias_E, 1000, torch.ones(64, dtype=torch.bool)),
            "set": lambda: quantile_bias(torch.zeros(8, 1000, dtype=torch.int64), bias_E, open_E, 2, 0.5),
        }
        assert tuple(do[work]().shape) == {"count": (8, 1000), "set": (8,)}[work]


def test_dropped_less_at_a_capacity_factor_of_one() -> None:
    """What it is for: after a few steps hardly an assignment finds its expert full."""
    layer = layer_of(router="sigmoid", balance="quantile", capacity_factor=1.0, min_capacity=1)
    layer.router.bias_E.zero_()
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.linspace(-1, 1, 6)
    x_TD = torch.randn(600, 16, generator=torch.Generator().manual_seed(4))
    x_TD[:, 0] = 2.0
    rates = []
    for _ in range(6):
        _, stats = layer(x_TD, context())
        rates.append(1 - int(stats.kept_E.sum()) / int(stats.load_E.sum()))
        layer.router.balance(stats.load_E, stats.needs_EB)
    assert ceil(600 * 2 / 6) >= int(stats.kept_E.max())
    assert rates[0] > 0.4 and rates[1] < 0.15 and rates[5] < 0.05, rates
