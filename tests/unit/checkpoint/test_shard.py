"""What we write as safetensors, the library reads; the digest is that of the file."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_dist.checkpoint import shard
from moe_dist.checkpoint.layout import Range
from moe_dist.checkpoint.shard import write_shard


@pytest.mark.parametrize("chunk", [3, 2**23])  # also chunks that cut elements
def test_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(shard, "_CHUNK", chunk)
    values = {"a": torch.randn(3).bfloat16(), 'q"ü/0': torch.randn(5), "c": torch.tensor([float("nan"), -0.0])}
    entries = []
    for name, whole in values.items():
        dtype = "BF16" if whole.dtype == torch.bfloat16 else "F32"
        piece = Range(kind="weight", name=name, start=7, length=len(whole), dtype=dtype)
        entries.append((piece, iter(whole.split(2))))
    path = tmp_path / "x.safetensors"
    written = write_shard(path, entries)
    assert written.size == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(f"weight/{name}/7" for name in values)
        for name, whole in values.items():
            read = file.get_tensor(f"weight/{name}/7")
            assert read.dtype == whole.dtype
            torch.testing.assert_close(read, whole, rtol=0, atol=0, equal_nan=True)


def test_no_ranges_and_no_overwriting(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    write_shard(path, [])
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == []
    with pytest.raises(FileExistsError):
        write_shard(path, [])
