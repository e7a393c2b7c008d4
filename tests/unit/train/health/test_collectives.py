"""Trails of three ranks, filled as their main threads would."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_dist.parallel.trail import KEPT, Trail, ranks_told
from moe_dist.train.health.collectives import Entered, describe, mismatch, read_entered, write_entered

WORLD, PAIR = (0, 1, 2), (0, 2)


def read(folder: Path, *trails: Trail) -> dict[int, Entered]:
    """By way of the files, as the judge reads them."""
    found = {}
    for rank, trail in enumerate(trails):
        write_entered(folder / str(rank), trail)
        entered = read_entered(folder / str(rank))
        assert entered is not None and entered.count == trail.count
        found[rank] = entered
    return found


def trails() -> list[Trail]:
    """Alike: more collectives than are kept, then one of a pair."""
    made = [Trail() for _ in WORLD]
    for trail in made:
        trail.enter("forward", 3)
        for _ in range(KEPT + 4):
            trail.note("all_to_all", WORLD, (5, 8), 160)
    for rank in PAIR:
        made[rank].note("all_reduce", PAIR, (4,), 16)
    return made


def test_nothing_is_said_of_ranks_that_have_done_the_same(tmp_path: Path) -> None:
    """Also not where each hands in as many rows as it has, nor of a group that was used long ago."""
    made = trails()
    made[0].note("all_gather", WORLD, (7,), 28)
    for trail in made[1:]:
        trail.note("all_gather", WORLD, (9,), 36)
    for _ in range(KEPT):
        made[2].note("broadcast", (2, 3))
    assert mismatch(read(tmp_path, *made)) is None
    assert mismatch({}) is None and read_entered(tmp_path / "missing") is None


@pytest.mark.parametrize("then", [(), ("all_gather", "update")])
def test_what_one_rank_left_out_is_named(tmp_path: Path, then: Sequence[str]) -> None:
    """Whether it stands still, or has gone on and entered another one in its place."""
    made = trails()
    for trail in made:
        trail.enter("backward")
    for trail in made[:2]:
        trail.note("all_reduce", WORLD, (6,), 24)
    if then:
        what, phase = then
        made[2].enter(phase)
        made[2].note(what, WORLD, (1,), 4)
    ending = "rank 2 entered all_gather (update of step 3)" if then else "rank 2 did not"
    entered = read(tmp_path, *made)
    whole = f"collective 21 of ranks 0 to 2: ranks 0, 1 entered all_reduce [6] (backward of step 3); {ending}"
    assert mismatch(entered) == whole
    del entered[1]  # of which nothing is known
    assert mismatch(entered) == whole.replace("ranks 0, 1", "rank 0")


def test_the_one_that_was_waited_for_longest_is_named(tmp_path: Path) -> None:
    """What came after it, in another group, waits for those that wait for it."""
    made = trails()
    made[0].note("all_reduce", WORLD, (6,), 24)
    made[2].note("reduce_scatter", PAIR, (6,), 24)
    entered = read(tmp_path, *made)
    for rank, when in ((0, 5.0), (2, 9.0)):
        each = entered[rank]
        entered[rank] = Entered(each.count, [call._replace(at=when) for call in each.last], each.numbers)
    said = mismatch(entered)
    assert said is not None and said.startswith("collective 21 of ranks 0 to 2: rank 0 entered all_reduce [6]"), said
    assert said.endswith("; ranks 1, 2 did not")


def test_the_last_ones_are_told(tmp_path: Path) -> None:
    told = describe(read(tmp_path, *trails()))
    assert told.count("rank ") == 3 and told.count("all_to_all") == 3 * KEPT - 2
    assert "s ago  all_to_all 20 of ranks 0 to 2 of [5, 8], 160 bytes; forward of step 3\n" in told
    assert "s ago  all_reduce 1 of ranks 0, 2 of [4], 16 bytes; forward of step 3\n" in told


def test_ranks_are_told_short() -> None:
    told = [ranks_told(ranks) for ranks in ((0, 1), (4,), (0, 4), (0, 2, 4, 6), range(0, 64, 8))]
    assert told == ["ranks 0 to 1", "ranks 4 to 4", "ranks 0, 4", "ranks 0, 2, 4, 6", "ranks 0, 8 to 56"]
