"""A near tie is adopted and counted; a real difference is kept and reported."""

import torch
from torch import Tensor

from moe_dist.verify.witness import Comparer, Differences, Recorder, Tape

SCORES = torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])


def taped(what: str = "router", scores: Tensor = SCORES) -> Tape:
    tape = Tape()
    Recorder(tape, step=3, micro=1).scores(0, what, scores)
    return tape


def comparer(tape: Tape, rank: int = 0, top_k: int = 1) -> tuple[Comparer, Differences]:
    found = Differences()
    return Comparer(tape, 3, 1, rank, top_k, 1e-3, found), found


def test_the_recorder_returns_what_it_was_given_and_keeps_a_copy() -> None:
    tape, scores = Tape(), SCORES.clone()
    recorder = Recorder(tape, 3, 1)
    assert recorder.scores(0, "router", scores) is scores
    scores.zero_()
    assert torch.equal(tape.scores[3, 1, 0, "router"], SCORES)
    recorder.decided(0, torch.tensor([[1], [0]]), torch.tensor([[True], [False]]))
    recorder.decided(1, torch.tensor([[1], [0]]), torch.tensor([[False], [False]]))
    assert tape.dropped() == 3


def test_equal_scores_are_no_difference() -> None:
    witness, found = comparer(taped())
    assert torch.equal(witness.scores(0, "router", SCORES), SCORES)
    assert found == Differences(near_ties=0, routed=0, dropped=0)


def test_a_near_tie_is_adopted_and_counted() -> None:
    """Rounding makes expert 1 of token 0 the larger by 1e-4; the reference took expert 0."""
    witness, found = comparer(taped(scores=SCORES + torch.tensor([1e-4, 0.0, 0.0])))
    own = SCORES + torch.tensor([0.0, 1e-4, 0.0])
    settled = witness.scores(0, "router", own)
    assert torch.equal(settled, SCORES + torch.tensor([1e-4, 0.0, 0.0]))
    assert settled[0].argmax() == 0
    assert found.near_ties == 1  # tokens 1 to 3 moved as little and chose the same


def test_a_real_difference_is_kept_and_reported() -> None:
    tape = taped()
    tape.experts[3, 1, 0], tape.kept[3, 1, 0] = torch.tensor([[0], [0], [1], [2]]), torch.ones(4, 1, dtype=torch.bool)
    witness, found = comparer(tape)
    own = SCORES.clone()
    own[1] = torch.tensor([0.2, 0.7, 0.1])
    settled = witness.scores(0, "router", own)
    assert torch.equal(settled, own)
    assert found.near_ties == 0
    kept = torch.tensor([[True], [True], [False], [False]])
    witness.decided(0, settled.topk(1).indices, kept)
    assert found == Differences(near_ties=0, routed=1, dropped=2)


def test_not_a_number_is_no_near_tie() -> None:
    witness, _ = comparer(taped())
    own = SCORES.clone()
    own[2, 1] = float("nan")
    assert witness.scores(0, "router", own)[2, 1].isnan()


def test_each_rank_is_compared_with_its_own_tokens() -> None:
    tape = taped()
    tape.experts[3, 1, 0] = torch.tensor([[0], [0], [1], [2]])
    tape.kept[3, 1, 0] = torch.tensor([[True], [True], [True], [False]])
    witness, found = comparer(tape, rank=1)
    assert torch.equal(witness.scores(0, "router", SCORES[2:] + 1e-4), SCORES[2:])
    witness.decided(0, torch.tensor([[1], [2]]), torch.tensor([[True], [False]]))
    assert found == Differences()
    witness.decided(0, torch.tensor([[0], [0]]), torch.tensor([[True], [True]]))
    assert found == Differences(near_ties=0, routed=2, dropped=1)


def test_order_among_the_chosen_counts() -> None:
    """top_k = 2 of (0.5, 0.5, 0): first and second swap."""
    witness, found = comparer(taped(scores=SCORES + torch.tensor([1e-4, 0.0, 0.0])), top_k=2)
    witness.scores(0, "router", SCORES + torch.tensor([0.0, 1e-4, 0.0]))
    assert found.near_ties == 2  # token 0 and token 3, whose second and third swap


def test_drop_scores_are_whole_on_every_rank_and_counted_once() -> None:
    reference = torch.tensor([0.3, 0.30001, 0.9, 0.1])
    for rank, expected in ((0, 2), (1, 0)):
        witness, found = comparer(taped("drop", reference), rank)
        settled = witness.scores(0, "drop", torch.tensor([0.30001, 0.3, 0.9, 0.1]))
        assert torch.equal(settled, reference)
        assert found.near_ties == expected  # two assignments changed places
