"""Megatron-core's indexed corpora: tokens in PREFIX.bin, and in PREFIX.idx where its sequences and documents begin.

Nothing in the two files is believed before it has been checked, and nothing is allocated by a number that they hold:
both are read once from end to end, in chunks. Training then reads the windows it needs from PREFIX.bin (stream.py).
A PREFIX.bin of more than WHOLE bytes would take minutes: of it SAMPLES parts, evenly spread, are read and hashed, and
each token is looked at when a window with it is read.

PREFIX.idx, little-endian: magic (9 bytes) · version u64 = 1 · dtype code u8 · sequences u64 · documents u64, plus one ·
length of each sequence i32 · its first byte in PREFIX.bin i64 · first sequence of each document i64, and the end ·
perhaps a mode of each sequence i8 (not used here).
"""

import bisect
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import NamedTuple, NoReturn

import numpy as np

from moe_dist.config.values import index_prefix
from moe_dist.data.stream import CheckedFile, OpenFiles, StoredTokens, TokenStream

MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)
_CHUNK = 1 << 20
WHOLE = 1 << 30
SAMPLES = 1024
_SAMPLE = 1 << 16  # bytes
_WANTED = "data.kind indexed reads PREFIX.idx and PREFIX.bin for each PREFIX in data.paths"


@dataclass(frozen=True)
class Index:
    """What a checked pair of files holds."""

    prefix: str
    dtype: np.dtype
    sequences: int
    documents: int
    """Documents; some may be empty."""
    tokens: int

    def document_start(self, file: BufferedReader, document: int) -> int:
        """First token of a document; `tokens` for the end of the last one."""
        (sequence,) = _array(file, self.prefix, self._documents_at + 8 * document, "<i8", 1)
        if sequence == self.sequences:
            return self.tokens
        (pointer,) = _array(file, self.prefix, self._pointers_at + 8 * int(sequence), "<i8", 1)
        return int(pointer) // self.dtype.itemsize

    @property
    def _pointers_at(self) -> int:
        return _HEADER.size + 4 * self.sequences

    @property
    def _documents_at(self) -> int:
        return self._pointers_at + 8 * self.sequences


class Indexed(NamedTuple):
    """Corpora one after the other. lengths: tokens of each in train and in validation. digest: SHA-256 of all the files
    and of where they are cut. sampled: .bin files of which parts were hashed. documents: of train."""

    train: TokenStream
    validation: TokenStream
    lengths: tuple[list[int], list[int]]
    digest: str
    sampled: list[str]
    documents: "Documents"


class Documents:
    """Numbers the documents of several corpora, of which the first `lengths` tokens each follow one another."""

    def __init__(self, indices: Sequence[Index], lengths: Sequence[int]) -> None:
        self._indices = indices
        self._starts = np.cumsum([0, *lengths])
        self._first = np.cumsum([0, *(index.documents for index in indices)])

    def __call__(self, offsets_N: np.ndarray) -> np.ndarray:
        """Of the tokens at these offsets, looked up in PREFIX.idx. Raises ValueError when it cannot be read."""
        which_N = np.searchsorted(self._starts, offsets_N, side="right") - 1
        numbers_N = np.empty(len(offsets_N), np.int64)
        for number in np.unique(which_N).tolist():
            index, here = self._indices[number], np.flatnonzero(which_N == number)
            with _open(f"{index.prefix}.idx") as file:
                inside = (offsets_N[here] - self._starts[number]).tolist()
                found = [_last_document_from(file, index, offset) for offset in inside]
            numbers_N[here] = self._first[number] + np.array(found)
        return numbers_N


def read_indexed(paths: Sequence[str], vocab_size: int, fraction: float, held_out: Sequence[str] = ()) -> Indexed:
    """The corpora with these prefixes. held_out: those that are for validation as a whole; then nothing of `paths` is.

    Otherwise the last documents of each prefix are held out: those that begin past a share 1 - fraction of its tokens.
    If no document does, the last one; a single document is cut there.

    Raises ValueError naming file and field when anything in the files is wrong, or a token id is not below vocab_size.
    """
    train, validation = [], []
    indices: list[Index] = []
    sampled: list[str] = []
    digest, files = hashlib.sha256(), OpenFiles()
    for path in (*paths, *held_out):
        prefix = index_prefix(path)
        index, idx_digest = check_index(prefix)
        bin_digest, file = _check_tokens(index, vocab_size)
        whole = file.size <= WHOLE
        if not whole:
            sampled.append(file.path)
        limit = None if whole else vocab_size
        for_validation = len(indices) >= len(paths)
        cut = 0 if for_validation else index.tokens if held_out else _cut(index, fraction)
        indices.append(index)
        digest.update(idx_digest + bin_digest + cut.to_bytes(8, "big"))
        if not for_validation:
            train.append(StoredTokens(files, file, index.dtype, 0, cut, limit))
        if for_validation or not held_out:
            validation.append(StoredTokens(files, file, index.dtype, cut, index.tokens, limit))
    lengths = [len(part) for part in train], [len(part) for part in validation]
    documents = Documents(indices[: len(train)], lengths[0])
    return Indexed(TokenStream(train), TokenStream(validation), lengths, digest.hexdigest(), sampled, documents)


def check_index(prefix: str) -> tuple[Index, bytes]:
    """Read all of PREFIX.idx against the sizes of both files; and its SHA-256. Raises ValueError."""
    with _open(f"{prefix}.idx") as file:
        bin_size = _size(f"{prefix}.bin")
        index = _read_header(file, prefix, bin_size)
        _check_sequences(file, index)
        _check_documents(file, index)
        file.seek(0)
        return index, hashlib.file_digest(file, "sha256").digest()


def document_starts(index: Index, at_once: int = _CHUNK) -> Iterator[np.ndarray]:
    """The first tokens of all documents and the end of the last one, int64, so many documents at a time; the end of a
    part opens the next."""
    with _open(f"{index.prefix}.idx") as file:
        for first in range(0, index.documents, at_once):
            count = min(at_once, index.documents - first) + 1
            entries = _array(file, index.prefix, index._documents_at + 8 * first, "<i8", count)
            begin, end = int(entries[0]), int(entries[-1])
            size = min(end + 1, index.sequences) - begin
            pointers = _array(file, index.prefix, index._pointers_at + 8 * begin, "<i8", size) // index.dtype.itemsize
            yield (
                np.append(pointers, index.tokens)[entries - begin]
                if end == index.sequences
                else pointers[entries - begin]
            )


def _read_header(file: BufferedReader, prefix: str, bin_size: int) -> Index:
    idx_size = os.fstat(file.fileno()).st_size
    if idx_size < _HEADER.size:
        _refuse(prefix, "size", f"it has {idx_size} bytes, but the header alone takes {_HEADER.size}")
    magic, version, code, sequences, entries = _HEADER.unpack(file.read(_HEADER.size))
    if magic != MAGIC:
        _refuse(prefix, "magic", f"it opens with {magic!r}, not {MAGIC!r}: no Megatron index")
    if version != 1:
        _refuse(prefix, "version", f"{version}, but only 1 is known")
    if code in _FLOATS:
        _refuse(prefix, "dtype code", f"{code} means floating point, but token ids are integers")
    if code not in _DTYPES:
        _refuse(prefix, "dtype code", f"{code} is none of {', '.join(map(str, _DTYPES))}")
    if sequences < 1:
        _refuse(prefix, "sequence count", "0: there is nothing in it")
    if entries < 2:
        _refuse(prefix, "document count", f"{entries}, but one document takes 2 entries")
    size = _HEADER.size + 12 * sequences + 8 * entries
    if idx_size not in (size, size + sequences):
        _refuse(
            prefix,
            "sequence count and document count",
            f"{sequences} and {entries} take {size} bytes, or {size + sequences} with modes, but it has {idx_size}",
        )
    dtype = np.dtype(_DTYPES[code])
    if bin_size == 0:
        raise ValueError(f"{prefix}.bin: it is empty")
    if bin_size % dtype.itemsize:
        raise ValueError(f"{prefix}.bin: its {bin_size} bytes are no whole number of {dtype.name} tokens")
    return Index(prefix, dtype, sequences, entries - 1, bin_size // dtype.itemsize)


def _check_sequences(file: BufferedReader, index: Index) -> None:
    """Lengths are not negative, add up to the tokens, and each pointer is the sum of the lengths before it."""
    total = 0
    for first, count in _chunks(index.sequences):
        lengths = _array(file, index.prefix, _HEADER.size + 4 * first, "<i4", count)
        pointers = _array(file, index.prefix, index._pointers_at + 8 * first, "<i8", count)
        if (wrong := _first(lengths < 0)) is not None:
            _refuse(index.prefix, "sequence lengths", f"sequence {first + wrong} has length {lengths[wrong]}")
        ends = total + np.cumsum(lengths, dtype=np.int64)
        starts = (ends - lengths) * index.dtype.itemsize
        if (wrong := _first(pointers != starts)) is not None:
            _refuse(
                index.prefix,
                "sequence pointers",
                f"sequence {first + wrong} is said to begin at byte {pointers[wrong]}, but the lengths before it add "
                f"up to {starts[wrong]}",
            )
        total = int(ends[-1])
        if total > index.tokens:
            break
    if total != index.tokens:
        more = " or more" if total > index.tokens else ""
        raise ValueError(
            f"{index.prefix}.bin: it has {index.tokens} tokens, but the sequence lengths in {index.prefix}.idx add up "
            f"to {total}{more}: the two do not belong together, or a copy was cut short"
        )


def _check_documents(file: BufferedReader, index: Index) -> None:
    """The document index starts with 0, never falls, and ends with the number of sequences."""
    before = 0
    for first, count in _chunks(index.documents + 1):
        entries = _array(file, index.prefix, index._documents_at + 8 * first, "<i8", count)
        if first == 0 and entries[0] != 0:
            _refuse(index.prefix, "document indices", f"they start with {entries[0]}, not 0")
        earlier = np.concatenate(([before], entries[:-1]))
        if (wrong := _first(entries < earlier)) is not None:
            problem = f"entry {first + wrong} is {entries[wrong]}, after {earlier[wrong]}"
            _refuse(index.prefix, "document indices", problem)
        before = int(entries[-1])
        if before > index.sequences:
            break
    if before != index.sequences:
        _refuse(index.prefix, "document indices", f"they end with {before}, not the sequence count {index.sequences}")


def _check_tokens(index: Index, vocab_size: int) -> tuple[bytes, CheckedFile]:
    """SHA-256 of PREFIX.bin, of which every token is looked at; or of its size and SAMPLES parts."""
    path, digest = f"{index.prefix}.bin", hashlib.sha256()
    with _open(path) as file:
        checked = CheckedFile.of(file)
        parts = _chunks(index.tokens)
        if checked.size > WHOLE:
            digest.update(checked.size.to_bytes(8, "big"))
            count = _SAMPLE // index.dtype.itemsize
            parts = (((index.tokens - count) * i // (SAMPLES - 1), count) for i in range(SAMPLES))
        for first, count in parts:
            file.seek(first * index.dtype.itemsize)
            data = file.read(count * index.dtype.itemsize)
            ids = np.frombuffer(data, index.dtype, len(data) // index.dtype.itemsize)
            if len(ids) < count:
                raise ValueError(f"{path}: it became shorter while it was read")
            if ids.min() < 0 or ids.max() >= vocab_size:
                wrong = _first((ids < 0) | (ids >= vocab_size))
                assert wrong is not None
                _refuse_token(index, first + wrong, int(ids[wrong]), vocab_size)
            digest.update(data)
    return digest.digest(), checked


def _refuse_token(index: Index, offset: int, token: int, vocab_size: int) -> NoReturn:
    with _open(f"{index.prefix}.idx") as file:
        document = _last_document_from(file, index, offset)
        inside = offset - index.document_start(file, document)
    way_out = "the file is damaged" if token < 0 else f"raise model.vocab_size above {token}"
    raise ValueError(
        f"{index.prefix}.bin: token id {token} at offset {offset} (token {inside} of document {document}) is not "
        f"within model.vocab_size={vocab_size}: {way_out}, or encode the text with the tokenizer of this model"
    )


def _cut(index: Index, fraction: float) -> int:
    """The first token held out."""
    wanted = max(1, int(index.tokens * (1 - fraction)))
    with _open(f"{index.prefix}.idx") as file:
        entries = range(index.documents + 1)
        after = bisect.bisect_left(entries, wanted, key=lambda d: index.document_start(file, d))
        start = index.document_start(file, after)
        if start == index.tokens:
            start = index.document_start(file, _last_document_from(file, index, index.tokens - 1))
    return start if start > 0 else wanted


def _last_document_from(file: BufferedReader, index: Index, offset: int) -> int:
    """The document that holds token `offset`."""
    entries = range(index.documents + 1)
    return bisect.bisect_right(entries, offset, key=lambda d: index.document_start(file, d)) - 1


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    """(first, count), at most _CHUNK at a time."""
    return ((first, min(_CHUNK, total - first)) for first in range(0, total, _CHUNK))


def _array(file: BufferedReader, prefix: str, at: int, dtype: str, count: int) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    data = os.pread(file.fileno(), size, at)
    if len(data) < size:
        raise ValueError(f"{prefix}.idx: it became shorter while it was read")
    return np.frombuffer(data, dtype)


def _first(wrong: np.ndarray) -> int | None:
    """Where the first True is."""
    return int(wrong.argmax()) if wrong.any() else None


def _open(path: str) -> BufferedReader:
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "no such file")
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {_WANTED}") from None


def _size(path: str) -> int:
    with _open(path) as file:
        return os.fstat(file.fileno()).st_size


def _refuse(prefix: str, field: str, problem: str) -> NoReturn:
    raise ValueError(f"{prefix}.idx: {field}: {problem}")
