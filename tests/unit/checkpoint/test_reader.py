"""Reading a checkpoint written by hand: two files, ranges that do not meet the reader's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.layout import MANIFEST, Manifest, Range, ShardFile
from moe_dist.checkpoint.reshard import Reader
from moe_dist.checkpoint.store import checkpoints, file_digest

W = torch.arange(10.0)
CUTS = {"rank-00000.safetensors": [("weight", "w", 4, 3), ("weight", "w", 0, 4)], "b": [("weight", "w", 7, 3)]}
MOMENT = ("exp_avg", "w", 0, 10)


def written(folder: Path, cuts: dict[str, list[tuple[str, str, int, int]]] | None = None) -> Path:
    """W in three ranges over two files, out of order; the moment, 100 more, in one range of the second file."""
    cuts = cuts or CUTS | {"b": [*CUTS["b"], MOMENT]}
    files = []
    for name, entries in cuts.items():
        ranges = [Range(kind=kind, name=of, start=start, length=length) for kind, of, start, length in entries]
        tensors = {r.key: (W + 100 * (r.kind == "exp_avg"))[r.start : r.start + r.length].clone() for r in ranges}
        path = folder / name
        save_file(tensors, path)
        files.append(ShardFile(file=name, size=path.stat().st_size, sha256=file_digest(path), ranges=ranges))
    manifest = Manifest(step=7, shapes={"w": [2, 5]}, files=files, run={"seed": 3})
    (folder / MANIFEST).write_text(manifest.dumps())
    return folder


def read(folder: Path, start: int, length: int, kind: str = "weight") -> Tensor:
    return Reader(folder).read(kind, "w", start, length)


def test_every_range_across_every_boundary(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path))
    for start in range(10):
        for length in range(1, 11 - start):
            assert torch.equal(reader.read("weight", "w", start, length), W[start : start + length])
            assert torch.equal(reader.read("exp_avg", "w", start, length), W[start : start + length] + 100)


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    manifest = Manifest.load(written(tmp_path))
    assert (manifest.step, manifest.shapes, manifest.run) == (7, {"w": [2, 5]}, {"seed": 3})
    assert [len(shard.ranges) for shard in manifest.files] == [2, 2]
    assert manifest.files[0].ranges[0] == Range(kind="weight", name="w", start=4, length=3)
    assert Manifest.load(tmp_path).dumps() == manifest.dumps()


@pytest.mark.parametrize(
    ("start", "length", "missing"),
    [
        (0, 10, "4 to 10"),
        (3, 2, "4 to 5"),
        (5, 1, "5 to 6"),
        (6, 4, "6 to 10"),
        (8, 4, "10 to 12"),
        (10, 1, "10 to 11"),
    ],
)
def test_a_missing_range(tmp_path: Path, start: int, length: int, missing: str) -> None:
    """Elements 4 to 7 are in no file, and the tensor ends at 10."""
    written(tmp_path, {"a": [("weight", "w", 0, 4)], "b": [("weight", "w", 7, 3)]})
    assert torch.equal(read(tmp_path, 1, 3), W[1:4])
    assert torch.equal(read(tmp_path, 7, 3), W[7:])
    with pytest.raises(ValueError, match=f"elements {missing} of weight/w are in no file"):
        read(tmp_path, start, length)


def test_a_tensor_nobody_wrote(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="elements 0 to 3 of exp_avg_sq/w are in no file"):
        read(written(tmp_path), 0, 3, kind="exp_avg_sq")


def test_whole_files_have_no_problems(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path))
    assert reader.check_digests(0, 1) == []
    assert reader.check_digests(0, 2) == reader.check_digests(1, 2) == reader.check_digests(2, 3) == []


def test_damage_is_found_by_the_rank_that_checks_the_file(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path))
    path = tmp_path / "b"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit; the size stays
    path.write_bytes(data)
    assert reader.check_digests(0, 2) == []
    assert reader.check_digests(1, 2) == [f"{path} does not match its SHA-256 in the manifest"]
    path.write_bytes(data[:-1])
    assert reader.check_digests(1, 2) == [f"{path} does not match its SHA-256 in the manifest"]
    path.unlink()
    assert reader.check_digests(0, 1) == [f"{path} is missing"]


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "b").write_bytes(b"rubbish")
    assert torch.equal(read(tmp_path, 0, 7), W[:7])
    with pytest.raises(ValueError, match=r"b: cannot be read"):
        read(tmp_path, 0, 8)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        '{"format": 1, "step": 7',
        "[]",
        "null",
        '{"format": 2, "step": 7, "shapes": {}, "files": [], "run": {}}',
        '{"step": 7, "shapes": {}, "files": [], "run": {}}',
        '{"format": 1, "step": 7, "shapes": {}, "run": {}}',
        '{"format": 1, "step": 7, "shapes": {}, "files": [{"file": "a"}], "run": {}}',
        '{"format": 1, "step": 7, "shapes": {}, "files": [{"file": "a", "ranges": [{"kind": "weight"}]}], "run": {}}',
        '{"format": 1, "step": 7, "shapes": {}, "files": 3, "run": {}}',
    ],
)
def test_a_broken_manifest_is_refused_by_its_path(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError) as error:
        Manifest.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / MANIFEST}: not a readable manifest: ")


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a readable manifest"):
        Reader(tmp_path)


def test_a_manifest_is_plain_json(tmp_path: Path) -> None:
    raw = json.loads((written(tmp_path) / MANIFEST).read_text())
    assert raw["format"] == 1
    assert raw["files"][0]["ranges"][1] == {"kind": "weight", "name": "w", "start": 0, "length": 4}


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-000020", "step-000003", "step-1000000", "step-000050", ".step-000060", "step-70", "other"):
        (tmp_path / name).mkdir()
        if name != "step-000050":
            (tmp_path / name / MANIFEST).write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000020", "step-1000000"]
    assert checkpoints(tmp_path / "nowhere") == []
