"""A clock whose readings are given, beside sums done by hand."""

from collections.abc import Iterator

import pytest
import torch

from moe_dist.parallel.told import told
from moe_dist.parallel.trail import Trail
from moe_dist.train.record.board import timing_scalars
from moe_dist.train.record.step_clock import IN_STEP, OWN, PARTS, StepClock, part_of, slowest


def clock_reading(readings: Iterator[float]) -> tuple[StepClock, Trail]:
    clock, trail = StepClock(torch.device("cpu")), Trail()
    clock._now = lambda: next(readings)
    trail.listener = clock.hear
    return clock, trail


def test_every_moment_is_in_one_part() -> None:
    readings = [0, 0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78, 91, 105, 120, 136, 153, 171]
    clock, trail = clock_reading(float(reading) for reading in readings)
    clock.begin(7)  # at 0
    trail.enter("data", 7)  # 0
    trail.enter("forward")  # 1
    with trail.inside("ep"), trail.inside("experts"):  # 3, 6
        pass  # 10: back to the wait
    trail.enter("backward")  # at 21, as the wait ended at 15
    with trail.inside("tp"):  # 28
        pass  # 36
    trail.enter("gradients")  # 45
    trail.enter("update")  # 55
    trail.enter("bookkeeping")  # 66
    trail.enter("evaluation")  # 78
    with trail.inside("ep"):  # 91
        pass  # 105
    trail.enter("checkpoint")  # 120
    clock.begin(8)  # 136
    by_hand = {"data": 1, "forward": 2 + 6, "dispatch_wait": 3 + 5, "experts": 4, "backward": 7 + 9, "other_wait": 8}
    by_hand |= {"gradient_exchange": 10, "optimizer": 11, "between": 12, "evaluation": 13 + 14 + 15, "save": 16}
    assert clock.handed_in() == [by_hand.get(part, 0) for part in OWN]
    timing = clock.record([[0.0] * len(OWN)])["timing"]
    assert timing == {"step": 7, **dict.fromkeys(set(PARTS) - {"graph"}, 0), **by_hand}
    assert sum(timing[part] for part in IN_STEP if part in timing) == 66 and sum(by_hand.values()) == 136


def test_nothing_is_told_of_steps_that_a_run_went_back_over() -> None:
    clock, trail = clock_reading(iter(map(float, range(100))))
    clock.begin(1)
    assert clock.handed_in() == [0.0] * len(OWN) and clock.record([]) == {}
    clock.begin(2)
    assert clock.handed_in()[0] == 1.0 and clock.record([[1.0] * 6])["timing"]["step"] == 1
    assert clock.describe_slowest() is None
    for own in ([2.0] + [1.0] * 5, [1.5] + [1.0] * 5, [0.0] * 6, [1.0] * 5 + [3.0]):
        clock.record([[1.0] * 6, own])
    assert clock.describe_slowest() == "rank 1 in 3 of 4 steps, most often in data"
    clock.forget()
    trail.enter("loading of a checkpoint")
    clock.begin(1)
    assert clock.handed_in() == [0.0] * len(OWN) and clock.record([]) == {}


def test_the_slowest_is_not_who_waits() -> None:
    own = dict.fromkeys(OWN, 1.0)
    table = [list((own | changed).values()) for changed in ({}, {"data": 1.5, "experts": 3.0}, {"experts": 1.5}, {})]
    assert slowest(table) == {"slowest": {"rank": 1, "part": "experts", "own": 8.5, "median_own": 6.25}}
    assert slowest(table[:1]) == {}
    told_to_board = dict(timing_scalars({"step": 3, "data": 0.5, **slowest(table)}))
    assert told_to_board == {"time/data": 0.5, "time/slowest_rank": 1, "time/slowest_over_median": 8.5 / 6.25}


@pytest.mark.parametrize(
    ("phase", "inside", "part"),
    [
        ("forward", "world", "dispatch_wait"),
        ("backward", "ep_across", "dispatch_wait"),
        ("backward", "dp", "gradient_exchange"),
        ("gradients", "edp", "gradient_exchange"),
        ("forward", "weights", "other_wait"),
        ("update", "ep", "other_wait"),
        ("statistics", "world", "other_wait"),
        ("backward", "data", "data"),
        ("evaluation", "experts", "evaluation"),
        ("forward and backward", "", "graph"),
        ("loading of a checkpoint", "", "between"),
    ],
)
def test_what_is_waited_for_depends_on_the_phase(phase: str, inside: str, part: str) -> None:
    assert part_of(phase, inside) == part


def test_experts_are_told_forward_and_backward() -> None:
    """Around their own work alone, though their input has another use; and not at all where nobody listens."""
    trail, heard = Trail(), list[str]()
    x = torch.ones(3, requires_grad=True)

    class Work(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            heard.append("forward")
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            heard.append("backward")
            return grad * 2

    def both(x: torch.Tensor) -> torch.Tensor:
        return told(trail, "experts", Work.apply, x).sum() + (x * x).sum()

    both(x).backward()
    assert heard == ["forward", "backward"] and torch.equal(x.grad, torch.full((3,), 4.0))  # type: ignore[arg-type]
    heard.clear()
    trail.listener = lambda phase, inside: heard.append(inside or "-")
    both(x).backward()
    assert heard == ["experts", "forward", "-", "experts", "backward", "-"]
    assert torch.equal(x.grad, torch.full((3,), 8.0))  # type: ignore[arg-type]
    heard.clear()
    with torch.no_grad():
        both(x)
    assert heard == ["experts", "forward", "-"]
