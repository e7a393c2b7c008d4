"""Writing a checkpoint anew on one process: in another precision, in another number of files, without moments.

What is stored stays the same logical tensors, so any layout reads either. Memory is one piece of a stream.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_dist.checkpoint.layout import MANIFEST, STEP_NAME, Dtype, Range, ShardFile
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.shard import TORCH_DTYPE, write_shard
from moe_dist.disk import flush, write_durably
from moe_dist.engine.base import Kind

Entry = tuple[Kind, str, int, int]  # kind, name, start, length


def convert(
    source: Path, target: Path, dtype: Dtype | None = None, files: int | None = None, weights_only: bool = False
) -> None:
    """Write the checkpoint `source` to the new folder `target`, committed as a run commits its own.

    dtype: of the weights, None as they are; moments, and what no optimizer holds, stay as they are. files: how many, of
    nearly equal numbers of elements; None as many as there are. The digests of the source have been found right. Raises
    ValueError when the target is there, or is named after another step. What is not finished leaves nothing behind.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: name a new folder")
    reader = Reader(source)
    before = reader.manifest
    named = STEP_NAME.fullmatch(target.name)
    if named and int(named[1]) != before.step:
        raise ValueError(
            f"{source} is of step {before.step}: as {target.name} nothing would read it; name it otherwise"
        )
    kinds: list[Kind] = ["weight"] if weights_only else before.kinds
    tensors = [(kind, name, elements) for kind, name, elements in before.tensors() if kind in kinds and elements]
    parts = list(cut(tensors, len(before.files) if files is None else files))

    draft = target.with_name(f".converting-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        shards = [_write(draft / f"part-{at:05d}.safetensors", part, reader, dtype) for at, part in enumerate(parts)]
        write_durably(draft / MANIFEST, replace(before, kinds=kinds, files=shards).dumps())
        flush(draft)
        draft.rename(target)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush(target.parent)


def cut(tensors: list[tuple[Kind, str, int]], files: int) -> Iterator[list[Entry]]:
    """`tensors`, end to end, in `files` parts whose numbers of elements differ by one at most."""
    total = sum(elements for _, _, elements in tensors)
    if not 1 <= files <= max(total, 1):
        raise ValueError(f"files={files} is outside 1 to {max(total, 1)}, the number of elements")
    begins, at = [], 0
    for _, _, elements in tensors:
        begins.append(at)
        at += elements
    for index in range(files):
        low, high = total * index // files, total * (index + 1) // files
        part = []
        for (kind, name, elements), begin in zip(tensors, begins, strict=True):
            first, last = max(low, begin), min(high, begin + elements)
            if first < last:
                part.append((kind, name, first - begin, last - first))
        yield part


def _write(path: Path, part: list[Entry], reader: Reader, dtype: Dtype | None) -> ShardFile:
    buffers = set(reader.manifest.buffers)
    entries = []
    for kind, name, start, length in part:
        stored = reader.dtypes(kind, name)
        new: Dtype = "F32" if "F32" in stored else "BF16"  # never to less precision than some of it has
        if dtype is not None and kind == "weight" and name not in buffers:
            new = dtype
        piece = Range(kind=kind, name=name, start=start, length=length, dtype=new)
        entries.append((piece, reader.stream(kind, name, start, length, TORCH_DTYPE[new])))
    return write_shard(path, entries)
