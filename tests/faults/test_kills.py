"""SIGKILL at random moments, anywhere from the start of a process to its last save: nothing is lost."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from moe_dist.chaos.damage import whole
from moe_dist.chaos.fault import Fault
from moe_dist.chaos.judge import losses
from moe_dist.chaos.series import Series
from tests.dist.programs import forked_ranks
from tests.faults.helpers import BATCH, series

Reference = Callable[[int], Series]
ASYNC = "--run.async-save"


def draw(by: random.Random, number: int, begin: int, steps: int, stride: int, ready: float) -> list[Fault]:
    """Every other kill falls on the way to the first step, as far as that is known; the others on the way from there,
    not more than `stride` steps, into a step, an evaluation or a save: and at its end, if the first came too late."""
    rank = by.randrange(2)
    last = Fault(kind="kill", rank=rank, step=min(begin + stride, steps), phase="data")
    if number % 2:
        return [Fault(kind="kill", rank=rank, after=by.uniform(0, 1.2 * ready)), last]
    step, phase = min(begin + by.randint(1, stride), steps), by.choice(["data", "backward"])
    return [Fault(kind="kill", rank=rank, step=step, phase=phase, later=by.uniform(0, 0.1)), last]


def check_kills(
    folder: Path, reference: Series, steps: int, kills: int, *flags: Sequence[str], forked: bool = False
) -> None:
    """flags: of each start in turn. forked: starts that die on the way to their first step are real ones, no others."""
    run, by, ready = series(folder, steps), random.Random(7), 10.0
    deaths = 0
    for number in range(kills):
        good = whole(run.checkpoints)
        begin = good[-1] if good else 0
        faults = draw(by, number, begin, steps, 2 * steps // kills, ready)
        with forked_ranks() if forked and number % 2 == 0 else nullcontext():
            start = run.start(faults, "--resume", "auto", *flags[number % len(flags)])
        deaths += start.codes[faults[0].rank] == -9
        first = start.first_step()
        assert first in (None, begin + 1), (first, good, start.said)
        if first is not None:
            ready = start.noted(0, "phase")[0]["time"] - start.began if not forked else ready
            assert not any(end.killed for end in start.ends), start.said  # who has lost a peer ends by itself
        after = whole(run.checkpoints)
        assert not good or (after and after[-1] >= good[-1]), (good, after)
    assert deaths == kills
    with forked_ranks() if forked else nullcontext():
        assert run.start().codes == [0, 0], run.starts[-1].said
    assert losses(run, reference, steps) == []
    history = run.samples()
    assert sorted(history) == list(range(1, steps + 1))
    used = [place for step in history.values() for rank in step for place in rank]
    assert len(used) == len(set(used)) == steps * BATCH  # within one epoch, so each at most once


def test_three_kills(tmp_path: Path, reference: Reference) -> None:
    check_kills(tmp_path, reference(40), 40, 3, [], [ASYNC], forked=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flags", [[], [ASYNC]], ids=["sync", "async"])
def test_twenty_kills(flags: list[str], tmp_path: Path, reference: Reference) -> None:
    check_kills(tmp_path, reference(200), 200, 20, flags)
