"""What a machine that loses its power must not lose: each file is on the disk before the name under which it counts.

Seen from outside, by the calls that reach the system: fsync of every file and folder, and the rename.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.convert import convert
from moe_dist.disk import replace_text
from moe_dist.study.ledger.ledger import Ledger
from tests.unit.checkpoint.helpers import HoldsState, alone, save


class Calls(list[tuple[str, str, int]]):
    """(call, path, size of the file at that moment), in order."""

    def at(self, call: str, path: Path) -> int:
        """When that call was made; a rename is known by its new name."""
        found = [index for index, (name, where, _) in enumerate(self) if (name, where) == (call, str(path))]
        assert len(found) == 1, (call, path, self)
        return found[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    seen = Calls()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    def watched(move: Any) -> Any:
        def moved(source: Any, target: Any, **how: Any) -> None:
            move(source, target, **how)
            seen.append(("rename", str(target), 0))

        return moved

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched(rename))
    monkeypatch.setattr(os, "replace", watched(replace))
    yield seen


def check_committed(calls: Calls, draft: Path, final: Path) -> None:
    """Shards, then the manifest that names them, the folder that lists both, its name, and the folder that has it."""
    files = sorted(final.iterdir())
    assert "manifest.json" in [path.name for path in files] and len(files) > 1
    manifest = calls.at("fsync", draft / "manifest.json")
    for path in files:
        at = calls.at("fsync", draft / path.name)
        assert at <= manifest and calls[at][2] == path.stat().st_size, f"{path} was forced out before it was whole"
    assert manifest < calls.at("fsync", draft) < calls.at("rename", final) < calls.at("fsync", final.parent)


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path: Path, calls: Calls) -> None:
    with alone():
        final = save(tmp_path / "run", HoldsState(), 3)
    check_committed(calls, tmp_path / "run/.step-000003", final)
    calls.clear()
    convert(final, tmp_path / "converted", files=3)
    check_committed(calls, tmp_path / ".converting-converted", tmp_path / "converted")


def test_the_manifest_goes_first_and_for_good_when_a_checkpoint_is_removed(tmp_path: Path, calls: Calls) -> None:
    with alone():
        for step in (1, 2):
            save(tmp_path, HoldsState(), step, keep_last=1)
    assert calls.at("fsync", tmp_path / "step-000001"), "its folder, after the manifest was taken out of it"


def test_a_replaced_file_is_on_the_disk_before_it_has_the_name(tmp_path: Path, calls: Calls) -> None:
    replace_text(tmp_path / "status.json", "text")
    ((first, draft, size), second) = calls
    assert (first, size) == ("fsync", 4) and Path(draft).parent == tmp_path
    assert second == ("rename", str(tmp_path / "status.json"), 0)


def test_a_line_of_the_ledger_is_on_the_disk_when_it_is_told(tmp_path: Path, calls: Calls) -> None:
    """And the folder that lists the file, when it is new."""
    path = tmp_path / "ledger.jsonl"
    for status in ("failed", "finished"):
        calls.clear()
        Ledger(path).append({"point": "a", "status": status})
        listed = [("fsync", str(tmp_path))] if status == "failed" else []
        assert calls[0] == ("fsync", str(path), path.stat().st_size)
        assert [(call, where) for call, where, _ in calls[1:]] == listed
