"""The kernel that chooses experts against the plain reference in float64: every output, every gradient."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from moe_dist.kernels.top_k import reference
from moe_dist.kernels.top_k.reference import Score, TopK
from moe_dist.kernels.top_k.triton import top_k_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")


def check(
    logits_TE: Tensor,
    top_k: int,
    score: Score = "softmax",
    chosen_TK: Tensor | None = None,
    chunk: int | None = None,
    first: int = 0,
) -> TopK:
    """All outputs, then the gradient of random sums of the differentiable ones, twice: the same bits."""
    logits_TE = logits_TE.to(DEVICE).requires_grad_()
    wide_TE = logits_TE.detach().double().requires_grad_()
    actual = top_k_experts(logits_TE, top_k, score, chosen_TK, chunk, first)
    again = top_k_experts(logits_TE, top_k, score, chosen_TK, chunk, first)
    wanted = reference.top_k_experts(wide_TE, top_k, score, chosen_TK, chunk, first)
    for name in (field.name for field in fields(TopK)):
        ours, theirs = getattr(actual, name), getattr(wanted, name)
        assert ours.dtype == (torch.float32 if theirs.is_floating_point() else theirs.dtype), name
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert torch.equal(ours, getattr(again, name)), name

    outputs = [(each.scores_TK, each.prob_sums_QE, each.z_sum) for each in (actual, again, wanted)]
    seeds = [torch.randn_like(output) for output in outputs[0][:2]] + [torch.tensor(0.01, device=DEVICE)]
    grad, repeated = (torch.autograd.grad(each, logits_TE, seeds)[0] for each in outputs[:2])
    expected = torch.autograd.grad(outputs[2], wide_TE, [seed.double() for seed in seeds])[0]
    assert grad.dtype == logits_TE.dtype
    tolerance = 1e-5 if grad.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance / 10)
    assert torch.equal(grad, repeated)
    return actual


@pytest.mark.parametrize(
    "tokens, experts, top_k", [(0, 5, 2), (1, 1, 1), (1, 5, 5), (67, 8, 3), (67, 60, 4), (67, 128, 8)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk, first", [(None, 0), (16, 5)])
def test_shapes(tokens: int, experts: int, top_k: int, score: Score, chunk: int | None, first: int) -> None:
    check(torch.randn(tokens, experts), top_k, score, chunk=chunk, first=first)


@pytest.mark.parametrize("experts, top_k, chunk", [(1, 1, 16), (5, 1, None), (8, 6, 16), (60, 7, 100), (128, 2, None)])
def test_many_tokens(experts: int, top_k: int, chunk: int | None) -> None:
    check(2 * torch.randn(300, experts), top_k, chunk=chunk, first=0 if chunk is None else 5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bfloat16(score: Score) -> None:
    check(torch.randn(67, 60).bfloat16(), 4, score, chunk=16, first=5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_given_experts(score: Score) -> None:
    chosen_TK = torch.rand(67, 8, device=DEVICE).argsort(-1)[:, :3]
    found = check(torch.randn(67, 8), 3, score, chosen_TK=chosen_TK, chunk=16, first=5)
    assert torch.equal(found.experts_TK, chosen_TK)
    columns_TK = torch.stack([chosen_TK, chosen_TK], -1)[..., 0]
    assert not columns_TK.is_contiguous()
    check(torch.randn(67, 8), 3, score, chosen_TK=columns_TK)


def test_equal_scores_go_to_the_lower_expert() -> None:
    found = check(torch.zeros(67, 60), 3)
    assert torch.equal(found.experts_TK, torch.arange(3, device=DEVICE).expand(67, 3))
    check(torch.randint(-1, 2, (67, 60)).float(), 8, "sigmoid", chunk=16)


def test_all_on_one_expert() -> None:
    logits_TE = torch.zeros(67, 8)
    logits_TE[:, 5] = 30.0
    found = check(logits_TE, 1, chunk=16, first=5)
    assert found.counts_QE[:, 5].tolist() == [11, 16, 16, 16, 8]
    assert found.counts_QE.sum() == 67


def test_large_logits_stay_finite() -> None:
    logits_TE = 60 * torch.randn(67, 8)
    logits_TE[3, 4] = float("-inf")  # an expert that is masked out
    found = top_k_experts(logits_TE.to(DEVICE), 2)
    wanted = reference.top_k_experts(logits_TE.double().to(DEVICE), 2)
    torch.testing.assert_close(found.scores_TK.double(), wanted.scores_TK, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy_sum.double(), wanted.entropy_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
def test_chosen_experts_exist_whatever_the_logits() -> None:
    """A NaN must reach the check for it, not an address outside the experts."""
    logits_TE = torch.randn(4, 5, device=DEVICE)
    logits_TE[0], logits_TE[1, 2], logits_TE[2] = float("nan"), float("nan"), float("-inf")
    for sign in (1.0, -1.0):
        experts_TK = top_k_experts(sign * logits_TE, 5).experts_TK
        assert torch.equal(experts_TK.sort(-1).values, torch.arange(5, device=DEVICE).expand(4, 5))
    assert top_k_experts(logits_TE, 1).z_sum.isnan()


def test_partial_and_expanded_gradients() -> None:
    logits_TE = torch.randn(67, 8, device=DEVICE, requires_grad=True)
    wide_TE = logits_TE.detach().double().requires_grad_()
    actual = top_k_experts(logits_TE, 2, "sigmoid", chunk=16)
    wanted = reference.top_k_experts(wide_TE, 2, "sigmoid", chunk=16)
    for name in ("scores_TK", "prob_sums_QE", "z_sum"):
        ours = torch.autograd.grad(getattr(actual, name).sum(), logits_TE, retain_graph=True)[0]
        theirs = torch.autograd.grad(getattr(wanted, name).sum(), wide_TE, retain_graph=True)[0]
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert not any(getattr(actual, name).requires_grad for name in ("experts_TK", "counts_QE", "entropy_sum"))


def test_strided_logits() -> None:
    logits_TE = torch.randn(8, 67).t()
    assert not logits_TE.is_contiguous()
    check(logits_TE, 2)


def test_many_experts() -> None:
    check(torch.randn(3, 600), 8, "sigmoid")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"2000 logits .* 1024: use kernels=torch"):
        top_k_experts(torch.randn(2, 2000, device=DEVICE), 2)
    with pytest.raises(ValueError, match=r"torch\.float64: use kernels=torch"):
        top_k_experts(torch.randn(2, 4, device=DEVICE, dtype=torch.float64), 2)
