"""One safetensors file of a checkpoint: written in a stream and hashed on the way, flushed to disk at the end.

The format is eight bytes with the header's length, the header as JSON, then the tensors' bytes end to end. Writing it
here rather than by the library keeps memory at one chunk, and the digest is of what went to the file, not of what came
back.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.layout import ITEM_BYTES, Dtype, Range, ShardFile

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16}
FILE_DTYPE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of safetensors files that others read and write."""
_CHUNK = 2**23


@dataclass(frozen=True)
class Stored:
    """A tensor on its way to a file: `parts` are its values, end to end, as 1-D CPU tensors of its dtype."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * FILE_DTYPE[self.dtype].itemsize


def write_shard(
    path: Path, entries: Sequence[tuple[Range, Iterable[Tensor]]], progress: Callable[[], None] = lambda: None
) -> ShardFile:
    """Write each range's values, given as 1-D CPU tensors of its dtype one after another; `path` must not exist yet.

    Values may come from a generator: no more than one of its tensors is held. progress: called now and then.
    """
    entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry[0].dtype])  # so that all are aligned
    stored = [Stored(piece.key, piece.dtype, (piece.length,), parts) for piece, parts in entries]
    size, sha256 = write_tensors(path, stored, progress=progress)
    return ShardFile(file=path.name, size=size, sha256=sha256, ranges=[piece for piece, _ in entries])


def write_tensors(
    path: Path,
    tensors: Sequence[Stored],
    metadata: dict[str, str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """A safetensors file of `tensors` in this order; (its bytes, their SHA-256). Otherwise as `write_shard`."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        assert tensor.key not in header, f"{tensor.key} is listed twice"
        place = [offset, offset + tensor.bytes]
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as helper:
        digest = hashlib.sha256()

        def put(chunk: memoryview) -> None:
            hashed = helper.submit(digest.update, chunk)  # both let other threads run
            at = 0
            while at < len(chunk):
                at += file.write(chunk[at:])
            hashed.result()
            progress()

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors:
            written = 0
            for values in tensor.parts:
                assert values.dtype == FILE_DTYPE[tensor.dtype], (tensor.key, values.dtype)
                data = values.contiguous().view(torch.uint8).numpy().data
                for first in range(0, len(data), _CHUNK):
                    put(data[first : first + _CHUNK])
                written += len(data)
            assert written == tensor.bytes, f"{tensor.key} got {written} bytes"
        size = file.tell()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
