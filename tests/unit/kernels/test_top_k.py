"""The plain choice of experts against a loop over tokens that a person can follow."""

import math

import pytest
import torch

from moe_dist.kernels.top_k.reference import Score, TopK, chunks_of, top_k_experts


def by_hand(
    rows: list[list[float]], top_k: int, score: Score, chunk: int | None, first: int
) -> tuple[list[list[int]], list[list[float]], dict[int, list[int]], dict[int, list[float]], float, float]:
    experts, scores, z, entropy = [], [], 0.0, 0.0
    counts: dict[int, list[int]] = {}
    sums: dict[int, list[float]] = {}
    for t, logits in enumerate(rows):
        e = [math.exp(logit) for logit in logits]
        s = [x / sum(e) for x in e] if score == "softmax" else [x / (1 + x) for x in e]
        p = [x / sum(s) for x in s]
        chosen = sorted(range(len(s)), key=lambda i: (-s[i], i))[:top_k]
        c = 0 if chunk is None else (first + t) // chunk - first // chunk
        counts.setdefault(c, [0] * len(s))
        sums.setdefault(c, [0.0] * len(s))
        for i in chosen:
            counts[c][i] += 1
        sums[c] = [a + b for a, b in zip(sums[c], p, strict=True)]
        experts.append(chosen)
        scores.append([s[i] for i in chosen])
        z += math.log(sum(e)) ** 2
        entropy -= sum(x * math.log(x) for x in p)
    return experts, scores, counts, sums, z, entropy


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk, first", [(None, 0), (16, 5), (4, 0), (100, 250)])
def test_against_a_loop(score: Score, chunk: int | None, first: int) -> None:
    tokens, experts, top_k = 37, 5, 3
    logits_TE = torch.randint(-2, 3, (tokens, experts)).double()  # many ties
    found = top_k_experts(logits_TE, top_k, score, chunk=chunk, first=first)
    wanted = by_hand(logits_TE.tolist(), top_k, score, chunk, first)
    assert found.experts_TK.tolist() == wanted[0]
    torch.testing.assert_close(found.scores_TK, torch.tensor(wanted[1], dtype=torch.float64))
    assert found.counts_QE.tolist() == [wanted[2][c] for c in sorted(wanted[2])]
    assert sorted(wanted[2]) == list(range(len(found.counts_QE)))
    torch.testing.assert_close(
        found.prob_sums_QE, torch.tensor([wanted[3][c] for c in sorted(wanted[3])], dtype=torch.float64)
    )
    assert found.z_sum.item() == pytest.approx(wanted[4])
    assert found.entropy_sum.item() == pytest.approx(wanted[5])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient(score: Score) -> None:
    logits_TE = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def outputs(logits_TE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = top_k_experts(logits_TE, 2, score, chunk=3, first=1)
        return found.scores_TK, found.prob_sums_QE, found.z_sum

    assert torch.autograd.gradcheck(outputs, logits_TE)


def test_given_experts_are_taken() -> None:
    logits_TE, chosen_TK = torch.randn(6, 4), torch.tensor([[3, 0]] * 6)
    found: TopK = top_k_experts(logits_TE, 2, chosen_TK=chosen_TK)
    assert torch.equal(found.experts_TK, chosen_TK)
    assert found.counts_QE.tolist() == [[6, 0, 0, 6]]
    assert torch.equal(found.scores_TK, logits_TE.softmax(-1)[:, [3, 0]])


def test_no_tokens() -> None:
    for chunk, first, chunks in ((None, 0, 1), (16, 5, 1), (16, 15, 1)):
        found = top_k_experts(torch.randn(0, 4), 2, chunk=chunk, first=first)
        assert found.experts_TK.shape == found.scores_TK.shape == (0, 2)
        assert torch.equal(found.counts_QE, torch.zeros(chunks, 4, dtype=torch.int64))
        assert torch.equal(found.prob_sums_QE, torch.zeros(chunks, 4))
        assert found.z_sum.item() == found.entropy_sum.item() == 0.0


def test_chunks_begin_before_the_first_token() -> None:
    chunk_T, chunks = chunks_of(6, 4, 6, torch.device("cpu"))  # tokens 6 to 11 of the whole: chunks 1, 1, 2, 2, 2, 2
    assert chunk_T.tolist() == [0, 0, 1, 1, 1, 1]
    assert chunks == 2
