"""Which tokens can be chosen, and how often they are."""

import pytest
import torch
from torch import Tensor

from moe_dist.generate.sampling import Sampling

LOGITS = torch.tensor([1.0, 6.0, 3.0, 0.0]).log()  # probabilities 0.1, 0.6, 0.3 and none


def shares(sampling: Sampling, draws: int = 1000) -> Tensor:
    """Over evenly spaced draws, so that shares are probabilities to 1 / draws."""
    chosen = sampling.choose(LOGITS.expand(draws, 4), torch.arange(draws, dtype=torch.float64) / draws)
    return chosen.bincount(minlength=4) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(temperature=1.0), [0.1, 0.6, 0.3, 0]),
        (dict(temperature=0), [0, 1, 0, 0]),
        (dict(temperature=0.5), [1 / 46, 36 / 46, 9 / 46, 0]),
        (dict(temperature=1.0, top_k=2), [0, 2 / 3, 1 / 3, 0]),
        (dict(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_k=9), [0.1, 0.6, 0.3, 0]),
        (dict(temperature=1.0, top_p=0.6), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_p=0.61), [0, 2 / 3, 1 / 3, 0]),
        (dict(temperature=1.0, top_p=1.0), [0.1, 0.6, 0.3, 0]),
        (dict(temperature=1.0, top_k=2, top_p=0.65), [0, 1, 0, 0]),  # of the two, the first has 2 / 3
    ],
    ids=str,
)
def test_shares(options: dict[str, float], expected: list[float]) -> None:
    torch.testing.assert_close(
        shares(Sampling(**options)), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.0021
    )


def test_an_impossible_token_is_never_chosen() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert Sampling(temperature=1.0).choose(logits, torch.tensor([draw], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
    ],
)
def test_mistakes(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
def test_hardly_any_temperature_is_none(temperature: float) -> None:
    logits_BV, draw_B = torch.randn(50, 9) * 40, torch.linspace(0, 0.999, 50, dtype=torch.float64)
    chosen_B = Sampling(temperature=temperature).choose(logits_BV, draw_B)
    assert chosen_B.equal(logits_BV.argmax(-1))
    tied_BV = torch.tensor([7.0, -1.0, 7.0]).expand(50, 3)
    assert Sampling(temperature=temperature).choose(tied_BV, draw_B).tolist() == [0] * 25 + [2] * 25


def test_the_highest_temperature_is_even() -> None:
    chosen_B = Sampling(temperature=1.7e308).choose(
        torch.tensor([[-80.0, 80.0]]).expand(2, 2), torch.tensor([0.4, 0.6])
    )
    assert chosen_B.tolist() == [0, 1]


def test_the_smallest_top_p_leaves_the_best() -> None:
    assert shares(Sampling(temperature=1.0, top_k=1, top_p=5e-324)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_choose_nothing(temperature: float, wrong: float) -> None:
    logits_BV = torch.tensor([[1.0, 2.0, -torch.inf], [1.0, wrong, 0.0], [-torch.inf] * 3])
    chosen_B = Sampling(temperature=temperature).choose(logits_BV, torch.full((3,), 0.9, dtype=torch.float64))
    assert chosen_B.tolist() == [1, -1, -1]
