"""A kill at every point of saving and pruning: what is found afterwards is whole, and the next save clears up."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moe_dist.checkpoint.reshard import newest_good
from moe_dist.checkpoint.store import checkpoints
from tests.unit.checkpoint.helpers import HoldsState, alone, save

# Every call that changes what is on disk, below all of ours and the library's.
CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """No `except Exception` may see the death of the process."""


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Whether `work` was killed before its `number`th change to the disk; False when it made fewer."""
    count = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            if count > number:
                raise AssertionError("somebody went on after the kill")
            return call(*args, **kwargs)

        return counted

    patches = [mock.patch.object(os, name, deadly(getattr(os, name))) for name in CALLS]
    for patch in patches:
        patch.start()
    try:
        work()
    except Killed:
        return True
    finally:
        for patch in patches:
            patch.stop()
    return False


@pytest.mark.parametrize(
    ("keep", "before", "step"),
    [({"keep_last": 1}, [1], 2), ({"keep_last": 2}, [1, 2, 3], 4), ({"keep_last": 1}, [4], 4)],
)
def test_a_kill_at_every_point(tmp_path: Path, keep: dict[str, int], before: list[int], step: int) -> None:
    """The last of the three saves a step over again."""
    points = 0
    with alone():
        while True:
            root = tmp_path / f"killed-{points}"
            for earlier in before:
                save(root, HoldsState(earlier), earlier, keep_last=9)
            died = killed_at(points + 1, lambda root=root: save(root, HoldsState(99), step, **keep))
            found, damaged = newest_good(root)
            assert found is not None and damaged == [], (points, os.listdir(root))
            if not died:
                break
            save(root, HoldsState(100), step + 1, **keep)
            left = sorted(os.listdir(root))
            assert set(left) <= {f"step-{s:06d}" for s in [*before, step, step + 1]}, left
            assert len(left) == keep["keep_last"] and f"step-{step + 1:06d}" in left, left
            assert [path.name for path in checkpoints(root)] == left
            assert newest_good(root)[0] == root / f"step-{step + 1:06d}"
            shutil.rmtree(root)
            points += 1
    assert points > 10
