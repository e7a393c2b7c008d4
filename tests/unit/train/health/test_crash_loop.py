from pathlib import Path

import pytest

from moe_dist.train.exit_codes import CRASH_LOOP, EndRun
from moe_dist.train.health.crash_loop import FILE, note_start, refuse_crash_loop, starts_from


def test_starts_from_one_checkpoint_are_counted(tmp_path: Path) -> None:
    assert starts_from(tmp_path, None) == (0, 0)
    for start in (1, 2, 3):
        note_start(tmp_path, None, starts_from(tmp_path, None)[0] + 1, 0)
        assert starts_from(tmp_path, None) == (start, 0)
    assert starts_from(tmp_path, 500) == (0, 0)  # progress
    (tmp_path / FILE).write_text("{torn")
    assert starts_from(tmp_path, None) == (0, 0)


def test_a_step_further_than_before_is_progress(tmp_path: Path) -> None:
    """Each start logs so many steps, from the same checkpoint; then how many in a row have got nowhere."""
    for last, nowhere in ((12, 0), (40, 0), (40, 1), (31, 2), (40, 3), (41, 0), (41, 1)):
        starts, furthest = starts_from(tmp_path, None)
        note_start(tmp_path, None, starts + 1, furthest)
        lines = "".join(f'{{"step": {step}}}\n' for step in range(1, last + 1))
        (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 99, "lo')
        assert starts_from(tmp_path, None) == (nowhere, max(last, 40 if nowhere else last))


def test_one_restart_too_many(tmp_path: Path) -> None:
    refuse_crash_loop(tmp_path, 500, 2, 2)
    refuse_crash_loop(tmp_path, 500, 1000, None)
    with pytest.raises(EndRun, match=r"3 starts have ended after the checkpoint of step 500 .*max_restarts=2") as ended:
        refuse_crash_loop(tmp_path, 500, 3, 2)
    assert ended.value.code == CRASH_LOOP
