import math
from pathlib import Path

import pytest

from moe_dist.config import GuardConfig
from moe_dist.train.exit_codes import DIVERGED, EndRun
from moe_dist.train.health.spikes import Health, SpikeDetector

OLD = Path("checkpoints/step-000008")


def test_the_limit_by_hand() -> None:
    """Of 1, 2, 3, 4, 100: median 3, distances 2, 1, 0, 1, 97, their median 1."""
    detector = SpikeDetector(window=5, mads=2.0)
    for loss in (1.0, 2.0, 3.0, 4.0, 100.0):
        detector.add(loss)
    assert detector.limit() == pytest.approx(3 + 2 * 1.4826)
    detector.add(3.0)  # the first falls out: 2, 3, 4, 100, 3: median 3, distances 1, 0, 1, 97, 0
    assert detector.limit() == pytest.approx(3 + 2 * 1.4826)


def test_silent_until_a_fifth_of_the_window_is_there() -> None:
    detector = SpikeDetector(window=20, mads=1.0)
    for _ in range(3):
        detector.add(2.0)
        assert detector.limit() == math.inf
    detector.add(2.0)
    assert detector.limit() == pytest.approx(2.02)  # no spread at all: a hundredth of the median


def test_what_is_not_finite_never_enters_the_statistics() -> None:
    health = Health(GuardConfig(spike="skip", spike_window=5, spike_mads=3.0), recent=[2.0, 2.1, 2.2, 2.1])
    for loss, aux in ((math.nan, 0.0), (math.inf, 0.0), (2.0, math.nan)):
        reason, _ = health.look(1, loss, aux)
        assert reason is not None and health.in_a_row < 3
        health.settle(1, loss, reason)
        health.in_a_row = 0
    assert health.look(2, 2.15, 0.0) == (None, None)
    health.settle(2, 2.15, None)
    assert health.look(3, 5.0, 0.0)[0] == "loss 5.0000 is above 2.3224"  # 2.1 + 3 * 1.4826 * 0.05
    assert health.skipped == 3


def test_losses_from_before_going_back_are_forgotten() -> None:
    health = Health(GuardConfig(spike="skip", spike_window=5, spike_mads=3.0), recent=[6.0, 6.1, 6.2])
    for step, loss in enumerate((3.0, 3.1, 3.0, 3.1, 3.0), start=4):
        health.settle(step, loss, None)
    assert health.look(4, 5.9, 0.0)[0] is not None
    health.compare_with([6.0, 6.1, 6.2])
    assert health.look(4, 5.9, 0.0) == (None, None)


def test_back_once_and_again_only_past_the_trouble() -> None:
    health = Health(GuardConfig(max_skipped=2))

    def nans(first: int) -> None:
        for step in (first, first + 1):
            reason, _ = health.look(step, math.nan, 0.0)
            health.settle(step, math.nan, reason)

    nans(10)
    assert health.trouble is not None and "2 steps in a row" in health.trouble
    health.go_back(11, OLD)
    assert (health.trouble, health.in_a_row) == (None, 0)
    health.saved(11)  # not past it
    nans(10)
    with pytest.raises(EndRun) as ended:
        health.go_back(11, OLD)
    assert (
        ended.value.code == DIVERGED
        and "at step 11 the run had gone back" in str(ended.value)
        and f"remove {OLD}" in str(ended.value)
    )
    health.saved(12)
    health.go_back(14, OLD)


def test_a_finite_step_breaks_the_row() -> None:
    health = Health(GuardConfig(max_skipped=2))
    for step, loss in enumerate((math.nan, 2.0, math.nan, 2.0), start=1):
        health.settle(step, loss, health.look(step, loss, 0.0)[0])
    assert health.trouble is None and health.skipped == 2


def test_a_spike_goes_back_once_a_step_and_only_where_there_is_a_checkpoint() -> None:
    guard = GuardConfig(spike="roll_back", spike_window=5, spike_mads=3.0)
    health = Health(guard, recent=[2.0] * 5)
    spike = health.look(6, 9.0, 0.0)[0]
    assert spike == "loss 9.0000 is above 2.0600" and health.trouble is None  # left out, and that is all
    health.settle(6, 9.0, spike)
    health.saved(8)
    for step in (9, 10):  # between two checkpoints
        health.settle(step, 9.0, health.look(step, 9.0, 0.0)[0])
        assert health.trouble == f"step {step}: loss 9.0000 is above 2.0600"
        health.go_back(step, OLD)
        assert health.trouble is None
    for step in (9, 10):
        assert health.look(step, 9.0, 0.0) == ("loss 9.0000 is above 2.0600, again", None) and health.trouble is None
