from pathlib import Path

import pytest

from moe_dist.train.crash_loop import FILE, note_start, refuse_crash_loop, starts_from
from moe_dist.train.exit_codes import CRASH_LOOP, EndRun


def test_starts_from_one_checkpoint_are_counted(tmp_path: Path) -> None:
    assert starts_from(tmp_path, None) == 0
    for start in (1, 2, 3):
        note_start(tmp_path, None, starts_from(tmp_path, None) + 1)
        assert starts_from(tmp_path, None) == start
    assert starts_from(tmp_path, 500) == 0  # progress
    (tmp_path / FILE).write_text("{torn")
    assert starts_from(tmp_path, None) == 0


def test_one_restart_too_many(tmp_path: Path) -> None:
    refuse_crash_loop(tmp_path, 500, 2, 2)
    refuse_crash_loop(tmp_path, 500, 1000, None)
    with pytest.raises(EndRun, match=r"3 starts have ended after the checkpoint of step 500 .*max_restarts=2") as ended:
        refuse_crash_loop(tmp_path, 500, 3, 2)
    assert ended.value.code == CRASH_LOOP
