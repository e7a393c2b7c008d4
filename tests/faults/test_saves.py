"""SIGKILL inside saving and pruning, before each change that a real save makes to the checkpoints' folder."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from moe_dist.chaos.damage import any_complete, corrupt, whole
from moe_dist.chaos.draw import changes
from moe_dist.chaos.fault import Fault
from moe_dist.chaos.judge import losses
from moe_dist.chaos.series import Series
from moe_dist.checkpoint.store import checkpoints
from tests.faults.helpers import series

pytestmark = pytest.mark.usefixtures("forked")

Reference = Callable[[int], Series]
EVERY = 5


@dataclass(frozen=True)
class Point:
    """case: the `first` save of a run, a `later` one that removes an old checkpoint, or a step saved `again`, for its
    checkpoint was damaged. change: {new} and {old} stand for the folders' names. later: seconds."""

    case: str
    rank: int
    change: str
    background: bool = False
    later: float = 0.0


def real_changes(reference: Series, case: str, rank: int) -> list[str]:
    """What the rank really changed in such a save, in order, with places for the names."""
    step = 5 if case == "first" else 15
    names = [entry["name"] for entry in reference.starts[0].noted(rank, "change", save=step)]
    names = list(dict.fromkeys(names))  # a folder is flushed, then opened to be emptied: that looks the same
    return [name.replace(f"step-{step:06d}", "{new}").replace("step-000005", "{old}") for name in names]


def every_point(reference: Series) -> list[Point]:
    points = []
    for background in (False, True):
        for case in ("first", "later"):
            names = real_changes(reference, case, 0)
            points += [Point(case, 0, name, background) for name in names]
            (shard,) = real_changes(reference, case, 1)
            points += [Point(case, 1, shard, background, later) for later in (0.0, 0.002, 0.01)]
        old = "{new}.old"
        again = ["rename {new}", "rename .{new}", "flush .", f"remove {old}/manifest.json", f"flush {old}"]
        again += [f"remove {old}/rank-00001.safetensors", f"rmdir {old}"]
        points += [Point("again", 0, name, background) for name in again]
    return points


def in_turn(points: list[Point]) -> list[Point]:
    """First saves first: where the folder of all is made, before the commit, after it; then steps saved again between
    later saves."""
    first = [point for point in points if point.case == "first"]
    first.sort(key=lambda point: (point.change != "mkdir .", point.change == "flush ."))
    later, again = ([point for point in points if point.case == case] for case in ("later", "again"))
    return first + [point for point in chain(*zip_longest(later, again)) if point is not None]


def prepared(run: Series, case: str, by: random.Random) -> tuple[int, int]:
    """Steps of the save to come in which the kill falls, and of the checkpoint that it removes; where a step is to be
    saved again, its checkpoint is damaged."""
    good = whole(run.checkpoints)
    if case != "again":
        new = [(good[-1] if good else 0) + EVERY * number for number in (1, 2, 3)]
        save = new[0] if case == "first" else (good + new)[max(2, len(good))]
        return save, (good + new)[0]
    while len(good) < 2 or checkpoints(run.checkpoints)[-1].name != f"step-{good[-1]:06d}":
        at = good[-1] + 2 * EVERY + 1
        assert run.start([Fault(kind="kill", rank=1, step=at, phase="data")]).codes[1] == -9
        good = whole(run.checkpoints)
    corrupt(run.checkpoints / f"step-{good[-1]:06d}", by.choice(["bit", "truncated", "empty", "removed"]), by)
    return good[-1], good[0]


def check_points(folder: Path, reference: Series, steps: int, points: list[Point]) -> None:
    run, by = series(folder, steps), random.Random(11)
    for point in in_turn(points):
        save, old = prepared(run, point.case, by)
        change = point.change.format(new=f"step-{save:06d}", old=f"step-{old:06d}")
        fault = Fault(kind="kill", rank=point.rank, save=save, change=change, later=point.later)
        good, gaps = whole(run.checkpoints), []
        newest = checkpoints(run.checkpoints)[-1:]
        damaged = "".join(str(path) for path in newest if path.name != f"step-{max(good, default=0):06d}")

        def watch(here: list[str] = gaps, had: bool = bool(good)) -> None:
            here += [] if any_complete(run.checkpoints) or not had else ["no whole checkpoint"]

        flags = ["--run.async-save"] if point.background else ["--run.no-async-save"]
        start = run.start([fault], "--resume", "auto", *flags, watch=watch)
        assert len(start.fired) == 1 and start.codes[fault.rank] == -9, f"{fault} did not come:\n{start.said}"
        assert not any(end.killed for end in start.ends) and 0 not in start.codes, start.said
        assert start.first_step() == (good[-1] + 1 if good else 1), f"{fault}:\n{start.said}"
        assert f"passed over: {damaged}" in start.said if damaged else "passed over" not in start.said, start.said
        after = whole(run.checkpoints)
        assert not gaps and (not good or after[-1] >= good[-1]), (fault, good, after, gaps)
    assert run.start().codes == [0, 0], run.starts[-1].said
    assert losses(run, reference, steps) == []
    assert not [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")]


def test_four_points(tmp_path: Path, reference: Reference) -> None:
    names = real_changes(reference(40), "first", 0), real_changes(reference(40), "later", 0)
    asked = [
        name.replace("step-000015", "{new}").replace("step-000005", "{old}") for name in changes(15, [5, 10], 2, 2)
    ]
    # What `moe-dist chaos` believes; and the first save ever makes the folder of all.
    assert sorted(names[1]) == sorted(asked) and [name for name in names[0] if name != "mkdir ."] == asked[:6]
    points = [
        Point("first", 0, "rename .{new}"),
        Point("later", 1, real_changes(reference(40), "later", 1)[0], background=True, later=0.002),
        Point("later", 0, "flush {old}", background=True),
        Point("again", 0, "rename .{new}"),
    ]
    check_points(tmp_path, reference(40), 40, points)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_points(tmp_path: Path, reference: Reference) -> None:
    points = random.Random(5).sample(every_point(reference(200)), 30)
    assert {(point.case, point.rank) for point in points} >= {("first", 0), ("later", 0), ("later", 1), ("again", 0)}
    check_points(tmp_path, reference(200), 200, points)
