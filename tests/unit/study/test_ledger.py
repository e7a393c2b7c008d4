"""The ledger: whole lines only, whoever writes and whatever is cut off."""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest

from moe_dist.disk import locked
from moe_dist.study.design.grid import CAPACITY
from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.ledger.measure import identity
from tests.unit.study.helpers import STUDY, toy_study


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


def test_a_line_that_cannot_be_read_is_named_and_the_rest_is_used(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    good = {"point": "b", "status": "finished"}
    bad = [b'{"point": "a"', b"\xff\x00", b"", b"[1]", b'{"status": "failed"}', b'{"point": "a", "status": "fin' * 9]
    ledger.path.write_bytes(b"\n".join([*bad[:3], json.dumps(good).encode(), *bad[3:]]) + b"\n")
    records, complaints = ledger.read()
    assert records == [good] and ledger.finished("b") and list(ledger.latest()) == ["b"]
    assert [text.split(" cannot")[0] for text in complaints] == [
        f"{ledger.path}, line {number}" for number in (1, 2, 3, 5, 6, 7)
    ]
    assert complaints[0].endswith("""left out: '{"point": "a"'""") and len(complaints[-1]) < len(str(ledger.path)) + 120
    ledger.append({"point": "a", "status": "finished"})
    assert list(ledger.latest()) == ["b", "a"] and len(ledger.read()[1]) == 6


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_line_with_what_is_no_number_is_left_out(tmp_path: Path, number: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append({"point": "a", "status": "failed"})
    with ledger.path.open("a") as file:
        file.write(f'{{"point": "a", "status": "finished", "validation_loss": {number}}}\n')
    assert not ledger.finished("a") and len(ledger.read()[1]) == 1


def test_a_reader_sees_what_came_since_and_starts_anew_with_another_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    reader, writer = Ledger(path), Ledger(path)
    for number in range(5):
        writer.append({"point": str(number % 2), "status": "failed", "number": number})
        assert [record["number"] for record in reader.records()] == list(range(number + 1))
    assert reader.attempts("0") == 3 and reader.attempts("1") == 2
    lines = path.read_bytes().split(b"\n")[:-1]
    for change in (lines[:2], [*lines[1:], lines[0], *lines], []):  # cut; other lines, and more; nothing
        path.write_bytes(b"".join(line + b"\n" for line in change))
        assert reader.records() == [json.loads(line) for line in change]
    path.unlink()
    assert reader.records() == [] and reader.attempts("0") == 0


def test_reading_and_writing_cost_the_same_however_long_the_file_is(tmp_path: Path) -> None:
    """A runner asks after each of its points: it must not read all of the file each time."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    line = json.dumps({"point": "old", "status": "finished", "fill": "x" * 20_000}).encode() + b"\n"
    ledger.path.write_bytes(line * 2000)  # 40 MB
    assert len(ledger.records()) == 2000

    def read() -> int:
        counts = Path("/proc/self/io").read_text().split("\n")
        return next(int(count.split()[1]) for count in counts if count.startswith("rchar"))

    before = read()
    for number in range(5):
        ledger.append({"point": str(number), "status": "finished"})
        assert ledger.finished(str(number))
    assert read() - before < 5 * 100_000  # each looks at no more than the last block of 64 KiB


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """What a limit on the size of files refuses in the middle of a line is taken back, and goes in later."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append({"point": "a", "status": "finished"})
    before = ledger.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=r"File too large.*ledger\.jsonl"):
            ledger.append({"point": "b", "status": "finished", "fill": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger.path.read_bytes() == before and list(ledger.latest()) == ["a"]
    ledger.append({"point": "b", "status": "finished"})
    assert list(ledger.latest()) == ["a", "b"]


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


def test_a_seed_that_comes_in_between_leaves_every_line_its_own(tmp_path: Path) -> None:
    """Pairs of seeds are numbered through: of {3, 4} by {5, 6} the pair (4, 5) is number 2, with a third of data 3."""
    before = toy_study(tmp_path, STUDY.replace("[0, 1]", "{weights: [3, 4], data: [5, 6]}"))
    ledger = Ledger(before.ledger)
    for point in before.points:
        loss = 10.0 * point.seeds["weights"] + point.seeds["data"] + 100 * (point.axes[CAPACITY] is None)
        ledger.append(identity(point) | {"status": "finished", "validation_loss": loss})
    after = toy_study(tmp_path, STUDY.replace("[0, 1]", "{weights: [3, 4], data: [5, 6, 7]}"))
    for cell in cells(after, ledger.latest()):
        more = 100 * (cell.axes[CAPACITY] is None)
        assert cell.by_seed("validation_loss") == {0: 35 + more, 1: 36 + more, 3: 45 + more, 4: 46 + more}
        assert [each["seeds"] for each in cell.records] == [{"weights": w, "data": d} for w in (3, 4) for d in (5, 6)]
