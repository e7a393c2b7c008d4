"""Reading a checkpoint written by hand: two files, ranges that do not meet the reader's; and what is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_dist.checkpoint.layout import FORMAT, MANIFEST, Manifest, Position, Range, ShardFile
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.shard import file_digest
from moe_dist.checkpoint.store import checkpoints

W = torch.arange(10.0)
ADDED = {"weight": 0, "exp_avg": 100, "exp_avg_sq": 200}
Cuts = dict[str, list[tuple[str, str, int, int]]]
MOMENTS = [("exp_avg", "w", 0, 10), ("exp_avg_sq", "w", 0, 5), ("exp_avg_sq", "w", 5, 5)]
CUTS: Cuts = {
    "rank-00000.safetensors": [("weight", "w", 4, 3), ("weight", "w", 0, 4)],
    "b": [("weight", "w", 7, 3), *MOMENTS],
}
AT = Position(seed=3, next_step=7)


def written(folder: Path, cuts: Cuts = CUTS, **changes: Any) -> Path:
    """W in three ranges over two files, out of order; moments, 100 and 200 more, in the second file."""
    files = []
    for name, entries in cuts.items():
        ranges = [Range(kind=kind, name=of, start=start, length=length) for kind, of, start, length in entries]
        tensors = {r.key: (W + ADDED[r.kind])[r.start : r.start + r.length].clone() for r in ranges}
        path = folder / name
        save_file(tensors, path)
        files.append(ShardFile(file=name, size=path.stat().st_size, sha256=file_digest(path), ranges=ranges))
    manifest = Manifest(
        step=7,
        data_position=AT,
        random_state=AT,
        kinds=list(ADDED),
        shapes={"w": [2, 5]},
        files=files,
        run={"seed": 3},
    )
    (folder / MANIFEST).write_text(replace(manifest, **changes).dumps())
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        Reader(folder)
    opening = f"{folder / MANIFEST}: not a readable manifest: "
    assert str(error.value).startswith(opening)
    return str(error.value).removeprefix(opening)


def read(folder: Path, start: int, length: int, kind: str = "weight") -> Tensor:
    return Reader(folder).read(kind, "w", start, length)


def test_every_range_across_every_boundary(tmp_path: Path) -> None:
    reader = Reader(written(tmp_path))
    for start in range(10):
        for length in range(1, 11 - start):
            for kind, added in ADDED.items():
                assert torch.equal(reader.read(kind, "w", start, length), W[start : start + length] + added)
    for start, length in ((8, 4), (10, 1)):
        with pytest.raises(ValueError, match=f"elements 10 to {start + length} of weight/w are in no file"):
            reader.read("weight", "w", start, length)


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    manifest = Manifest.load(written(tmp_path, validation_loss=1.25, config={"model": {"d_model": 3, "list": [None]}}))
    assert (manifest.step, manifest.shapes, manifest.run) == (7, {"w": [2, 5]}, {"seed": 3})
    assert manifest.data_position == manifest.random_state == AT and manifest.validation_loss == 1.25
    assert manifest.config == {"model": {"d_model": 3, "list": [None]}}
    assert [len(shard.ranges) for shard in manifest.files] == [2, 4]
    assert manifest.files[0].ranges[0] == Range(kind="weight", name="w", start=4, length=3)
    assert Manifest.load(tmp_path).dumps() == manifest.dumps()


def test_a_manifest_is_plain_json_with_a_digest_of_itself(tmp_path: Path) -> None:
    text = (written(tmp_path) / MANIFEST).read_text()
    raw = json.loads(text)
    assert raw["format"] == FORMAT
    assert raw["files"][0]["ranges"][1] == {"kind": "weight", "name": "w", "start": 0, "length": 4, "dtype": "F32"}
    assert raw["sha256"] == hashlib.sha256(text.replace(raw["sha256"], "0" * 64).encode()).hexdigest()


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 4), (7, 3)], "elements 4 to 7 of weight/w are in no file"),
        ([(4, 6)], "elements 0 to 4 of weight/w are in no file"),
        ([(0, 4), (4, 4)], "elements 8 to 10 of weight/w are in no file"),
        ([], "elements 0 to 10 of weight/w are in no file"),
        ([(0, 6), (4, 6)], "elements 4 to 6 of weight/w are stored twice"),
        ([(0, 10), (2, 3)], "elements 2 to 5 of weight/w are stored twice"),
        ([(0, 10), (10, 2)], "weight/w has 10 elements, but 12 are stored"),
        ([(0, 5), (5, 0), (5, 5)], "weight/w has a range of 0 elements from 5 on"),
        ([(-2, 12)], "weight/w has a range of 12 elements from -2 on"),
    ],
)
def test_ranges_that_do_not_fit(tmp_path: Path, ranges: list[tuple[int, int]], words: str) -> None:
    shard = [Range(kind="weight", name="w", start=start, length=length) for start, length in ranges]
    file = ShardFile(file="a", size=10**6, sha256="", ranges=shard)
    written(tmp_path, kinds=["weight"], files=[file])
    assert refusal(tmp_path) == words


WHOLE = [Range(kind="weight", name="w", start=0, length=10)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            (dict(files=[ShardFile(file=name, size=99, sha256="", ranges=WHOLE)]), f"file {name!r} is no plain name")
            for name in ("../a", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "manifest.json", "a\x00b", "a\n")
        ),
        (
            dict(files=[ShardFile(file="a", size=39, sha256="", ranges=WHOLE)]),
            "a of 39 bytes cannot hold its ranges of 40 bytes",
        ),
        (dict(files=[ShardFile(file="a", size=99, sha256="", ranges=part) for part in (WHOLE, [])]), "file 'a' is no"),
        (dict(shapes={"w": [2**40, 2**40]}), "w has the impossible shape"),
        (dict(shapes={"w": [-2, -5]}), "w has the impossible shape"),
        (dict(shapes={"w": [2, 5], "v": [3]}), "elements 0 to 3 of weight/v are in no file"),
        (dict(shapes={"v": [2, 5]}), "elements 0 to 10 of weight/v are in no file"),
        (dict(shapes={}), "its files hold weight/w, which is no tensor of this model"),
        (dict(shapes={"w": [2, 5], "v\x1b[2J": [0]}), r"'v\x1b[2J' is no name of a parameter"),
        (dict(step=8), "data_position goes on at step 7 (from 0), but 8 steps are done"),
        (dict(random_state=replace(AT, next_step=6)), "random_state goes on at step 6 (from 0), but 7 steps are done"),
        (dict(buffers=["u"]), "buffers or frozen parameters ['u'] have no shape"),
        (dict(kinds=["weight", "exp_avg"]), "kinds=['weight', 'exp_avg'] is neither"),
        (dict(kinds=["weight", "exp_avg", "exp_avg_sq"]), "elements 0 to 10 of exp_avg/w are in no file"),
    ],
)
def test_a_manifest_that_contradicts_itself(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = ShardFile(file="a", size=99, sha256="", ranges=WHOLE)
    written(tmp_path, **{"kinds": ["weight"], "files": [file]} | changes)
    assert words in refusal(tmp_path)


def test_a_folder_that_names_another_step(tmp_path: Path) -> None:
    for name, fits in (("step-000007", True), ("step-000007.old", True), ("mine", True), ("step-000008", False)):
        (tmp_path / name).mkdir()
        written(tmp_path / name)
        if fits:
            Reader(tmp_path / name)
        else:
            assert "it is of step 7, but lies in a folder named step-000008" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "weight/w/7": t["weight/w/7"].half()}, "F16 [3] in the file, but F32 [3] in the manifest"),
        (lambda t: {**t, "weight/w/7": W[:2].clone()}, "F32 [2] in the file, but F32 [3] in the manifest"),
        (lambda t: {**t, "weight/w/7": W[:3].clone().view(3, 1)}, "F32 [3, 1] in the file"),
        (lambda t: {**t, "more": W.clone()}, "more is in the file, but not in the manifest"),
        (lambda t: {k: v for k, v in t.items() if "sq/w/5" not in k}, "exp_avg_sq/w/5 is in the manifest, but not"),
    ],
)
def test_a_header_that_says_something_else(tmp_path: Path, change: Callable[[dict], dict], words: str) -> None:
    """Though size and digest are right: the manifest was made for that file."""
    manifest = Manifest.load(written(tmp_path))
    path = tmp_path / "b"
    tensors = {f"{k}/{n}/{s}": (W + ADDED[k])[s : s + length].clone() for k, n, s, length in CUTS["b"]}
    save_file(change(tensors), path)
    last = replace(manifest.files[1], size=path.stat().st_size, sha256=file_digest(path))
    (tmp_path / MANIFEST).write_text(replace(manifest, files=[manifest.files[0], last]).dumps())
    with pytest.raises(ValueError) as error:
        Reader(tmp_path).read("weight", "w", 0, 10)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    assert Reader(tmp_path).check_digests(0, 1) == [str(error.value)]


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
    assert reader.check_digests(1, 2) == [f"{path} has {len(data) - 1} bytes, not the {len(data)} of the manifest"]
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
        '{"format": 2, "step": 7',
        "[]",
        "null",
        '{"format": 1, "step": 7, "shapes": {}, "files": [], "run": {}}',
        '{"step": 7, "shapes": {}, "files": [], "run": {}}',
        '{"format": 2, "step": 7}',
        '{"format": 2, "sha256": 3, "step": 7}',
        "[" * 100_000,
    ],
)
def test_a_broken_manifest_is_refused_by_its_path(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw | {"surplus": 1},
        lambda raw: raw | {"step": "7"},
        lambda raw: raw | {"files": 3},
        lambda raw: raw | {"files": [{"file": "a"}]},
        lambda raw: raw | {"files": [raw["files"][0] | {"size": 1.5}]},
        lambda raw: {key: value for key, value in raw.items() if key != "shapes"},
        lambda raw: raw | {"kinds": ["weight", "grad"]},
    ],
)
def test_a_manifest_of_other_types_is_refused(tmp_path: Path, change: Callable[[dict], dict]) -> None:
    """Though its own digest is right."""
    raw = json.loads((written(tmp_path) / MANIFEST).read_text())
    text = json.dumps(change(raw) | {"sha256": "0" * 64})
    (tmp_path / MANIFEST).write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    words = refusal(tmp_path)
    assert "altered" not in words


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a readable manifest"):
        Reader(tmp_path)


def test_only_folders_with_a_manifest_are_checkpoints(tmp_path: Path) -> None:
    names = ("step-000020", "step-000003", "step-1000000", "step-000050", ".step-000060", "step-70", "other")
    for name in (*names, "step-000003.old"):
        (tmp_path / name).mkdir()
        if name != "step-000050":
            (tmp_path / name / MANIFEST).write_text("{}")
    found = ["step-000003.old", "step-000003", "step-000020", "step-1000000"]
    assert [path.name for path in checkpoints(tmp_path)] == found
    assert checkpoints(tmp_path / "nowhere") == []
