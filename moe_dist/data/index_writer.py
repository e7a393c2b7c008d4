"""Writes Megatron-core's indexed corpora: byte for byte the files that its IndexedDatasetBuilder writes.

What a document needs in memory is its tokens alone: lengths go to a file of their own, from which PREFIX.idx is made at
the end, so that a corpus of any size is written in constant memory. Every document is one sequence. The format is told
in indexed.py.

    FOLDER/tokens    becomes PREFIX.bin         FOLDER/lengths    i32 of each document
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import numpy as np

from moe_dist.data.indexed import MAGIC
from moe_dist.disk import replacing

_UINT16 = 65500
"""Vocabularies below this size are written as 16 bits, as in Megatron-core (DType.optimal_dtype)."""
_CODES = {"uint16": 8, "int32": 4}
_LONGEST = 2**31 - 1
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """How far the files go. open_length: tokens of the document at the end, which has not ended."""

    tokens: int = 0
    documents: int = 0
    open_length: int = 0


class IndexWriter:
    """Appends to the files in `folder` from where `at` says they are right; what is behind it is cut off."""

    def __init__(self, folder: Path, vocab_size: int, at: Written | None = None) -> None:
        self.dtype = dtype_of(vocab_size)
        self.written = at or Written()
        self._tokens = _opened(folder / "tokens", self.written.tokens * self.dtype.itemsize)
        self._lengths = _opened(folder / "lengths", self.written.documents * 4)

    def add(self, tokens: bytes, lengths: np.ndarray, ends: bool = True) -> None:
        """Documents that follow one another, each with its end-of-text token. tokens: of `dtype`. lengths: int64. ends:
        whether the last one does. Raises ValueError for a document longer than an index can say."""
        lengths = lengths.copy()
        before = self.written
        if len(lengths):
            lengths[0] += before.open_length
            if lengths.max() > _LONGEST:
                raise ValueError(f"a document has {lengths.max()} tokens, but an index says at most {_LONGEST}: cut it")
        ended = lengths if ends else lengths[:-1]
        self._tokens.write(tokens)
        self._lengths.write(ended.astype("<i4").tobytes())
        self.written = Written(
            before.tokens + len(tokens) // self.dtype.itemsize,
            before.documents + len(ended),
            0 if ends or not len(lengths) else int(lengths[-1]),
        )

    def sync(self) -> None:
        """All that was added is on the disk when this returns."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._tokens.close()
        self._lengths.close()


@contextmanager
def index_writer(folder: Path, vocab_size: int, at: Written | None = None) -> Iterator[IndexWriter]:
    writer = IndexWriter(folder, vocab_size, at)
    try:
        yield writer
    finally:
        writer.close()


def dtype_of(vocab_size: int) -> np.dtype:
    """As Megatron-core chooses it."""
    return np.dtype("<u2" if vocab_size < _UINT16 else "<i4")


def write_index(lengths: Path, dtype: np.dtype, path: Path) -> None:
    """PREFIX.idx at `path`, of documents of one sequence each. lengths: the file that an IndexWriter left."""
    documents = lengths.stat().st_size // 4
    with replacing(path) as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, _CODES[dtype.name], documents, documents + 1))
        for part in _parts(lengths):
            file.write(part.tobytes())
        at = 0
        for part in _parts(lengths):
            ends = at + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            at = int(ends[-1])
        for first in range(0, documents + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, documents + 1), dtype="<i8").tobytes())


def _parts(lengths: Path) -> Iterator[np.ndarray]:
    with lengths.open("rb") as file:
        while data := file.read(4 * _CHUNK):
            yield np.frombuffer(data, "<i4")


def _opened(path: Path, size: int) -> BufferedRandom:
    """To write on from byte `size`. Raises ValueError when the file is shorter."""
    path.touch()
    if path.stat().st_size < size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but {size} were written: remove the folder it is in")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
