"""The ledger: whole lines only, whoever writes and whatever is cut off."""

import json
import multiprocessing
from pathlib import Path

import pytest

from moe_dist.disk import locked
from moe_dist.study.ledger import Ledger


def test_the_last_line_of_a_point_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "ledger.jsonl")
    assert ledger.latest() == {}
    for status in ("failed", "finished"):
        assert not ledger.finished("a")
        ledger.append({"point": "a", "status": status})
    ledger.append({"point": "b", "status": "failed"})
    assert ledger.finished("a") and not ledger.finished("b")
    assert len(ledger.records()) == 3


@pytest.mark.parametrize("cut", [1, 10, 28])
def test_a_torn_last_line_is_ignored_then_removed(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append({"point": "a", "status": "finished"})
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + b'{"point": "b", "status": "failed"}\n'[:cut])
    assert list(ledger.latest()) == ["a"]
    ledger.append({"point": "c", "status": "finished"})
    assert ledger.path.read_bytes() == whole + b'{"point": "c", "status": "finished"}\n'


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_text('{"point": "a"\n{"point": "b"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        ledger.records()


def _append(path: Path, writer: int) -> None:
    for number in range(20):
        Ledger(path).append({"point": f"{writer}-{number}", "status": "finished", "fill": "x" * 5000})


def test_writers_do_not_tear_each_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writers = [multiprocessing.get_context("spawn").Process(target=_append, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({json.loads(line)["point"] for line in path.read_text().splitlines()}) == 60


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock", wait=False) as second:
        assert first is not None and second is None
    with locked(tmp_path / "lock", wait=False) as third:
        assert third is not None
