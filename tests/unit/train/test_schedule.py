"""Learning rates counted by hand."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config.schema import OptimConfig, RunConfig
from moe_dist.train.schedule import evaluates_after, evaluation_steps, learning_rate, schedule_notes

SCHEDULES = ["constant", "cosine", "linear", "wsd"]


def curve(steps: int, **optim: object) -> list[float]:
    config = OptimConfig(**{"lr": 8.0, "min_lr_ratio": 0.25, "warmup_steps": 2} | optim)
    return [learning_rate(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [4, 8, 8, 8, 8, 8]),
        ("linear", [4, 8, 6.5, 5, 3.5, 2]),
        ("cosine", [4, 8, 5 + 3 * 0.5**0.5, 5, 5 - 3 * 0.5**0.5, 2]),
        ("wsd", [4, 8, 8, 8, 5, 2]),
    ],
)
def test_six_steps_two_of_warm_up(schedule: str, expected: list[float]) -> None:
    assert curve(6, schedule=schedule, decay_fraction=1 / 3) == pytest.approx(expected)


@given(st.sampled_from(SCHEDULES), st.integers(0, 30), st.integers(1, 100), st.floats(0, 1), st.floats(0, 1))
def test_ends_and_shape(schedule: str, warmup: int, length: int, ratio: float, decay: float) -> None:
    steps, peak = warmup + length, max(0, warmup - 1)
    rates = curve(steps, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio, decay_fraction=decay)
    assert rates[0] == pytest.approx(8.0 / max(1, warmup))
    assert rates[peak] == 8.0
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-9 for a, b in pairwise(rates[peak:]))
    decays = schedule in ("cosine", "linear") or (schedule == "wsd" and round(decay * steps) > 0)
    if decays and steps > peak + 1:
        assert rates[-1] == pytest.approx(8.0 * ratio)
    if schedule == "constant":
        assert set(rates[peak:]) == {8.0}


def test_wsd_decay_is_cut_to_what_the_warm_up_leaves() -> None:
    assert curve(4, schedule="wsd", decay_fraction=1.0) == pytest.approx([4, 8, 5, 2])
    assert curve(4, schedule="wsd", decay_fraction=0.0) == pytest.approx([4, 8, 8, 8])


def test_run_shorter_than_its_warm_up() -> None:
    assert curve(2, schedule="cosine", warmup_steps=4) == pytest.approx([2, 4])
    (note,) = schedule_notes(2, OptimConfig(lr=8.0, warmup_steps=4))
    assert "after steps=2 of warmup_steps=4: the learning rate reaches 4.0e+00 of lr=8.0e+00" in note
    assert schedule_notes(4, OptimConfig(warmup_steps=4)) == []


@pytest.mark.parametrize("step", [-1, 10])
def test_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step={step} must be in 0..9"):
        learning_rate(step, 10, OptimConfig())


@given(st.integers(1, 300), st.integers(1, 300))
def test_evaluations_lie_at_equal_fractions(steps: int, evaluations: int) -> None:
    evaluations = min(evaluations, steps)
    expected = [math.ceil(Fraction(number * steps, evaluations)) for number in range(1, evaluations + 1)]
    assert evaluation_steps(steps, evaluations) == expected and len(set(expected)) == evaluations
    run = RunConfig(evaluations=evaluations, eval_every=1)
    assert [step for step in range(1, steps + 1) if evaluates_after(step, steps, run)] == expected


def test_without_them_every_nth_step_and_the_last_is_evaluated() -> None:
    assert [step for step in range(1, 12) if evaluates_after(step, 11, RunConfig(eval_every=4))] == [4, 8, 11]
