"""Sampling from a decoder, mostly from one whose next token is known."""

import pytest
import torch
from torch import Tensor

from moe_dist.models.decoder import Decoder
from moe_dist.models.generate import generate
from moe_dist.moe.routing import StepContext
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import tiny_model

CPU = torch.device("cpu")


class Counting:
    """The next token is the last one plus 1, modulo 10, for certain; remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, tokens_1S: Tensor, step: StepContext) -> Tensor:
        assert step.phase == "dropless"
        self.shown.append(tokens_1S[0].tolist())
        return 1000.0 * torch.nn.functional.one_hot((tokens_1S + 1) % 10, 10).float()


def test_continues_the_prompt() -> None:
    model = Counting()
    assert generate(model, [7], 5, window=4, seed=0, device=CPU) == [8, 9, 0, 1, 2]
    # the window fills up, then slides; what is not known yet is filled with zeros after the last token
    assert model.shown == [[7, 0, 0, 0], [7, 8, 0, 0], [7, 8, 9, 0], [7, 8, 9, 0], [8, 9, 0, 1]]


def test_a_prompt_longer_than_the_window() -> None:
    model = Counting()
    assert generate(model, [1, 2, 3, 4, 5], 2, window=3, seed=0, device=CPU) == [6, 7]
    assert model.shown == [[3, 4, 5], [4, 5, 6]]


def test_nothing_to_generate_and_nothing_to_start_from() -> None:
    assert generate(Counting(), [1], 0, window=4, seed=0, device=CPU) == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(Counting(), [], 3, window=4, seed=0, device=CPU)


def test_samples_follow_the_probabilities() -> None:
    """Logits log(6, 3, 1): at temperature 1 these are 0.6, 0.3 and 0.1."""
    logits = torch.tensor([6.0, 3.0, 1.0]).log()
    found = generate(lambda ids, _: logits.expand(1, 1, 3), [0], 2000, window=1, seed=0, device=CPU, temperature=1.0)
    share = torch.tensor(found).bincount(minlength=3) / 2000
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.05)
    cold = generate(lambda ids, _: logits.expand(1, 1, 3), [0], 50, window=1, seed=0, device=CPU, temperature=0.01)
    assert cold == [0] * 50


def test_a_decoder_is_deterministic_in_the_seed() -> None:
    model = Decoder(tiny_model(), single_process_mesh())

    def text(seed: int) -> list[int]:
        return generate(lambda ids, step: model(ids, None, step, "logits"), [1, 2], 12, window=8, seed=seed, device=CPU)

    assert text(0) == text(0)
    assert text(0) != text(1)
    assert len(text(0)) == 12
    assert set(text(0)) <= set(range(32))


def test_filled_positions_are_not_seen() -> None:
    """A longer window holds more filler, which a causal model must not notice."""
    model = Decoder(tiny_model(), single_process_mesh())
    texts = [
        generate(lambda ids, step: model(ids, None, step, "logits"), [3], 5, window=window, seed=0, device=CPU)
        for window in (6, 9)
    ]
    assert texts[0] == texts[1]
