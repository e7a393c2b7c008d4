"""What lies in the way of a save and cannot be removed: said once, passed by, nothing lost on the way.

The suite may run as root, whom no rights keep out, so removing fails by a patch.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.reshard import newest_good
from moe_dist.checkpoint.retention import Retention
from tests.unit.checkpoint.helpers import INFO, HoldsState, alone, save


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Path]]:
    """Folders that cannot be removed, for as long as they are in the set."""
    paths: set[Path] = set()
    rmtree = shutil.rmtree

    def fails(path: Path, ignore_errors: bool = False, **how: Any) -> None:
        if path not in paths:
            rmtree(path, ignore_errors=ignore_errors, **how)
        elif not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", fails)
    with alone():
        yield paths


def saver(root: Path, said: list[str]) -> Saver:
    return Saver(root, HoldsState().mesh, Retention(keep_last=1), INFO, say=said.append)


def holds(checkpoint: Path, state: HoldsState) -> bool:
    reader = Reader(checkpoint)
    assert reader.check_digests(0, 1) == []
    return all(
        torch.equal(reader.read(kind, name, 0, values.numel()), values.view(-1))
        for kind, tensors in state.state.items()
        for name, values in tensors.items()
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_step_is_saved_again_beside_an_old_one_that_stays(
    whole: bool, stuck: set[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    final, old, keeps = tmp_path / "step-000004", tmp_path / "step-000004.old", saver(tmp_path, said)
    states = [HoldsState(seed) for seed in range(4)]
    save(tmp_path, states[0], 4)
    shutil.copytree(final, old)
    if not whole:
        (old / "manifest.json").unlink()
    stuck.add(old)
    rename, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        found, damaged = newest_good(tmp_path)
        assert found is not None and damaged == [], (target, os.listdir(tmp_path))
        seen.append(next(number for number, state in enumerate(states) if holds(found, state)))

    monkeypatch.setattr(os, "rename", watched)
    for state in states[1:]:
        keeps.save(state, 4)
    assert seen == [0, 1, 1, 2, 2, 3], "a name was given away before another had what it stood for"
    assert sorted(os.listdir(tmp_path)) == [final.name, old.name]
    assert said == [f"warning: {old} cannot be removed (Device or resource busy); trying again after each save"]
    stuck.clear()
    keeps.save(states[0], 5)
    assert os.listdir(tmp_path) == ["step-000005"] and len(said) == 1


def test_a_half_written_one_that_stays_is_passed_by(stuck: set[Path], tmp_path: Path) -> None:
    said: list[str] = []
    draft, keeps = tmp_path / ".step-000004", saver(tmp_path, said)
    draft.mkdir()
    (draft / "rank-00000.safetensors").write_bytes(b"half")
    stuck.add(draft)
    for state in map(HoldsState, (1, 2)):
        assert holds(keeps.save(state, 4), state)
    assert sorted(os.listdir(tmp_path)) == [draft.name, "step-000004"]
    assert said == [f"warning: {draft} cannot be removed (Device or resource busy); trying again after each save"]
    (tmp_path / ".step-000004-2").mkdir()  # as if killed in the second
    stuck.clear()
    keeps.save(HoldsState(3), 5)
    assert os.listdir(tmp_path) == ["step-000005"]
