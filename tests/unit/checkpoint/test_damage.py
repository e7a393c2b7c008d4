"""Damage of every kind in every file: refused by the file's name, and the step before is taken instead."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.convert import convert
from moe_dist.checkpoint.layout import MANIFEST
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.reshard import load, newest_good
from moe_dist.checkpoint.store import checkpoints
from tests.unit.checkpoint.helpers import HoldsState, alone, save

Mutation = Callable[[Path, random.Random], None]


def flip(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(1, path.stat().st_size))


def empty(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


def append(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(8))


def garbage(path: Path, dice: random.Random) -> None:
    path.write_bytes(dice.randbytes(path.stat().st_size))


def missing(path: Path, dice: random.Random) -> None:
    path.unlink()


def swapped(path: Path, dice: random.Random) -> None:
    """With another file of the same checkpoint, or with the same file of the one before."""
    others = [other for other in path.parent.iterdir() if other.name not in (path.name, MANIFEST)]
    other = dice.choice([*others, path.parent.with_name("step-000001") / path.name])
    data = other.read_bytes()
    if other.parent == path.parent:
        other.write_bytes(path.read_bytes())
    path.write_bytes(data)


def mutate(tmp_path: Path, count: int) -> None:
    with alone():
        good, better = HoldsState(1), HoldsState(2)
        for step, engine in ((1, good), (2, better)):
            # Converted, for several files; written by a run, each rank has one.
            written = save(tmp_path / "from", engine, step)
            convert(written, tmp_path / "root" / f"step-00000{step}", files=3)
        root, spare = tmp_path / "root", tmp_path / "spare"
        broken = root / "step-000002"
        shutil.copytree(root, spare)
        names = sorted(path.name for path in broken.iterdir())
        assert len(names) == 4 and MANIFEST in names
        kinds: list[Mutation] = [flip, flip, flip, truncate, empty, append, garbage, missing, swapped]
        for index in range(count):
            dice = random.Random(index)
            kind, name = kinds[index % len(kinds)], names[index // len(kinds) % len(names)]
            kind(broken / name, dice)
            what = f"{kind.__name__} of {name}, number {index}"
            assert broken in checkpoints(root), what
            with pytest.raises(ValueError) as error:
                load(broken, HoldsState())  # type: ignore[arg-type]
            assert name in str(error.value), what
            found, problems = newest_good(root)
            assert found == root / "step-000001", what
            assert any(name in problem for problem in problems), what
            engine = HoldsState()
            assert load(found, engine, checked=True).step == 1  # type: ignore[arg-type]
            for tensors, expected in zip(engine.state.values(), good.state.values(), strict=True):
                assert all(torch.equal(tensors[key], expected[key]) for key in expected)
            shutil.rmtree(root)
            shutil.copytree(spare, root)
        assert newest_good(root) == (broken, [])


def test_damage_is_refused_and_the_step_before_taken(tmp_path: Path) -> None:
    mutate(tmp_path, 36)


@pytest.mark.slow
def test_200_mutations(tmp_path: Path) -> None:
    mutate(tmp_path, 216)


def test_a_manifest_that_is_gone_is_missed_where_its_checkpoint_was_the_newest(tmp_path: Path) -> None:
    with alone():
        folders = [save(tmp_path, HoldsState(), step) for step in (1, 2, 3)]
        (folders[0] / MANIFEST).unlink()
        assert checkpoints(tmp_path) == folders[1:], "older than a whole one: a removal that was cut short"
        (folders[2] / MANIFEST).unlink()
        found, (problem,) = newest_good(tmp_path)
        assert found == folders[1] and f"{folders[2] / MANIFEST}: not a readable manifest" in problem
        (folders[1] / MANIFEST).unlink()
        with pytest.raises(ValueError, match=r"all checkpoints under .* are damaged"):
            newest_good(tmp_path)  # not (None, []): a run would begin anew, and remove what is left of them
        assert all((folder / "rank-00000.safetensors").exists() for folder in folders)


def test_removing_leaves_alone_what_a_link_points_to(tmp_path: Path) -> None:
    with alone():
        archived = save(tmp_path / "archive", HoldsState(1), 1)
        root = tmp_path / "root"
        root.mkdir()
        (root / archived.name).symlink_to(archived)
        (root / "step-000009").symlink_to(tmp_path / "nowhere")
        (root / "step-000002").write_text("a file of the user's")
        assert newest_good(root) == (root / archived.name, [])
        save(root, HoldsState(3), 3, keep_last=1)
        assert sorted(path.name for path in root.iterdir()) == ["step-000002", "step-000003"]
        assert Reader(archived).check_digests(0, 1) == []


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    with alone():
        assert newest_good(tmp_path / "nowhere") == (None, [])
        for step in (1, 2):
            path = save(tmp_path, HoldsState(), step)
            flip(path / "rank-00000.safetensors", random.Random(step))
        with pytest.raises(ValueError) as error:
            newest_good(tmp_path)
    words = str(error.value)
    assert "step-000001" in words and "step-000002" in words
    assert "--resume never and another --run.name" in words


def test_a_run_that_fell_back_keeps_what_it_writes(tmp_path: Path) -> None:
    """The damaged later checkpoint does not count as the newest one to keep, and goes when it has been left behind."""
    with alone():
        for step in (1, 2, 3):
            path = save(tmp_path, HoldsState(step), step)
        garbage(path / "rank-00000.safetensors", random.Random())
        save(tmp_path, HoldsState(), 2, keep_last=1)
        assert os.listdir(tmp_path) == ["step-000002"]
        garbage(save(tmp_path, HoldsState(), 4) / MANIFEST, random.Random())
        save(tmp_path, HoldsState(), 3, keep_last=1)
        assert os.listdir(tmp_path) == ["step-000003"]
        assert newest_good(tmp_path) == (tmp_path / "step-000003", [])


@pytest.mark.parametrize("retention", [dict(keep_best=True), dict(keep_every=7), dict(keep_last=3)])
def test_a_history_that_was_left_does_not_come_back(tmp_path: Path, retention: dict[str, Any]) -> None:
    """A file of step 7 cannot be read for a while; the run falls back to step 4 and goes on to other steps. Then 7,
    which it will not write again, is readable, and has the lowest loss of all."""
    kept: dict[str, Any] = {"keep_last": 1} | retention
    with alone():
        for step, loss in ((4, 3.0), (7, 1.0)):
            path = save(tmp_path, HoldsState(step), step, loss=loss, keep_last=9)
        shard, aside = path / "rank-00000.safetensors", tmp_path / "aside"
        shard.rename(aside)
        assert newest_good(tmp_path)[0] == tmp_path / "step-000004"
        save(tmp_path, HoldsState(), 5, loss=2.0, **kept)
        if path.exists():
            aside.rename(shard)
        assert newest_good(tmp_path)[0] == tmp_path / "step-000005"
        save(tmp_path, HoldsState(), 8, loss=2.5, **kept)
    left = {"keep_best": [5, 8], "keep_every": [8], "keep_last": [4, 5, 8]}[next(iter(retention))]
    assert sorted(path.name for path in checkpoints(tmp_path)) == [f"step-{step:06d}" for step in left]


def test_the_best_stays_over_restarts(tmp_path: Path) -> None:
    """Its loss is read from the disk; a step that is saved again counts with its new loss."""
    with alone():
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
            save(tmp_path, HoldsState(step), step, loss=loss, keep_last=1, keep_best=True)
        assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000004"]
        garbage(tmp_path / "step-000004" / "rank-00000.safetensors", random.Random())
        assert newest_good(tmp_path)[0] == tmp_path / "step-000002"
        for step, loss in ((2, 5.0), (3, 3.0), (4, 4.0)):
            save(tmp_path, HoldsState(step), step, loss=loss, keep_last=1, keep_best=True)
        assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000004"]
