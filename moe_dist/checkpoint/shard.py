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
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.checkpoint.layout import ITEM_BYTES, Dtype, Range, ShardFile

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16}
_CHUNK = 2**23


def write_shard(
    path: Path, entries: Sequence[tuple[Range, Iterable[Tensor]]], progress: Callable[[], None] = lambda: None
) -> ShardFile:
    """Write each range's values, given as 1-D CPU tensors of its dtype one after another; `path` must not exist yet.

    Values may come from a generator: no more than one of its tensors is held. progress: called now and then.
    """
    entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry[0].dtype])  # so that all are aligned
    header, offset = {}, 0
    for piece, _ in entries:
        place = [offset, offset + piece.bytes]
        header[piece.key] = {"dtype": piece.dtype, "shape": [piece.length], "data_offsets": place}
        offset = place[1]
    assert len(header) == len(entries), "a range is listed twice"
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
        for piece, parts in entries:
            written = 0
            for values in parts:
                assert values.dtype == TORCH_DTYPE[piece.dtype], (piece, values.dtype)
                data = values.contiguous().view(torch.uint8).numpy().data
                for first in range(0, len(data), _CHUNK):
                    put(data[first : first + _CHUNK])
                written += len(data)
            assert written == piece.bytes, f"{piece} got {written} bytes"
        size = file.tell()
        os.fsync(file.fileno())
    return ShardFile(file=path.name, size=size, sha256=digest.hexdigest(), ranges=[piece for piece, _ in entries])


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
