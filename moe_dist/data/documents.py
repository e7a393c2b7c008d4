"""From paths to texts as UTF-8 bytes: files are unpacked and decoded, and what is no text is named with its reason.

Compression is told by a file's first bytes, never by its name; so is UTF-16 and UTF-32, by their byte-order mark. Other
encodings cannot be told from each other: such text stays the bytes that it is.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

from moe_dist.config.extras import install

_SNIFFED = 8192
_SHOWN = 3
_RECORDED = 100


def _from_zstd(file: IO[bytes]) -> Any:
    """The file as it is, where pyarrow is not there: it is then no text, and _NO_TEXT says why."""
    try:
        import pyarrow
    except ImportError:
        return file
    return pyarrow.CompressedInputStream(file, "zstd")


_PACKED: list[tuple[re.Pattern[bytes], Callable[[IO[bytes]], Any]]] = [
    (re.compile(rb"\x1f\x8b\x08"), lambda file: gzip.GzipFile(fileobj=file)),
    (re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _from_zstd),
]
_MARKS = [  # a UTF-32 mark opens with a UTF-16 one
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, "utf-8-sig")),
]
_NO_TEXT = [
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd, which pyarrow unpacks: {install('data')}"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF-", "a PDF"),
    (b"PAR1", "a Parquet file"),
    (b"MMIDIDX", "a Megatron index"),
]
BLOCK = 1 << 20
"""Bytes of text that are worked on at a time."""
_LETTER_ENDS = re.compile(rb"[A-Za-z\x80-\xff](?=\r?\n)")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file can raise, packed or not."""


@dataclass(frozen=True)
class Document:
    key: bytes
    """What its split depends on: the path below the corpus' root, as raw bytes, or the text itself."""
    data: bytes
    above: tuple[str, ...] = ()
    """The folders that the key leaves out, outermost first."""


@dataclass
class LeftOut:
    """Names of what was found and not taken, by reason."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def describe(self) -> str:
        """`3 left out: 2 empty (a, b), 1 binary (c)`; nothing where nothing was."""
        parts = []
        for reason, names in self.names.items():
            more = ", ..." if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:_SHOWN])}{more})")
        return f"{len(self)} left out: {', '.join(parts)}" if parts else ""

    def record(self) -> dict[str, dict[str, Any]]:
        """{reason: {count, names}}, as plain data. The first names alone: of records there may be millions."""
        return {why: {"count": len(names), "names": names[:_RECORDED]} for why, names in self.names.items()}


def read_text(path: Path) -> tuple[bytes, str | None]:
    """(the text as UTF-8, or as it is where no mark names its encoding; why it is no text). Raises UNREADABLE."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        unpacked = _unpacked(file)
        head = unpacked.read(_SNIFFED)
        encoding = _encoding(head)
        if encoding is None and (reason := _no_text(head)):
            return b"", reason
        data: bytes = head + unpacked.read()
        if os.fstat(file.fileno()).st_size != size or (unpacked is file and len(data) != size):
            raise OSError(f"{path} changes while it is read")
    if encoding is not None:
        try:
            data = data.decode(encoding).encode("utf-8")
        except UnicodeError:
            return b"", f"not the {encoding.removesuffix('-sig').upper()} that its byte-order mark says"
        if reason := _no_text(data[:_SNIFFED]):
            return b"", reason
    return data, None if data else "empty"


def open_lines(path: Path) -> TextIO:
    """A text file, unpacked and decoded, line ends as they are. Raises UNREADABLE; ValueError for what is no text."""
    file = path.open("rb")
    unpacked, encoding, reason = _opened(file)
    if reason:
        file.close()
        raise ValueError(f"{path} in data.paths is {reason}: give text")
    return io.TextIOWrapper(unpacked, encoding=encoding or "utf-8", newline="")


def open_text(file: IO[bytes]) -> tuple[io.BufferedReader, str | None]:
    """(the text of an open file as UTF-8, or as it is where no mark names its encoding; why it is no text), to be read
    in parts. Raises UNREADABLE; the stream too, and UnicodeError where the text is not what its mark says."""
    unpacked, encoding, reason = _opened(file)
    return (unpacked if encoding is None else io.BufferedReader(_Recoded(unpacked, encoding))), reason


class _Recoded(io.RawIOBase):
    """Text of another encoding as UTF-8, without its mark."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file, self._decoder, self._left = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"-"
        while not self._left and data:
            data = self._file.read(_SNIFFED)
            self._left = self._decoder.decode(data, final=not data).encode()
        now, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(now)] = now
        return len(now)


def _opened(file: IO[bytes]) -> tuple[io.BufferedReader, str | None, str | None]:
    """(unpacked, the encoding that its mark names, why it is no text)."""
    unpacked = io.BufferedReader(_unpacked(file), _SNIFFED)
    head = unpacked.peek(_SNIFFED)[:_SNIFFED]
    encoding = _encoding(head)
    return unpacked, encoding, _no_text(head) if encoding is None else None


def _unpacked(file: IO[bytes]) -> Any:
    head = file.read(16)
    file.seek(0)
    return next((unpack(file) for magic, unpack in _PACKED if magic.match(head)), file)


def _encoding(head: bytes) -> str | None:
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def _no_text(head: bytes) -> str | None:
    known = next((what for magic, what in _NO_TEXT if head.startswith(magic)), None)
    return known or ("binary" if b"\0" in head else None)


def cut(data: bytes) -> int:
    """Where the first part of a text in UTF-8 ends that is longer than BLOCK; all of a shorter one.

    That is between a letter and the end of its line, where tokenizers that split a text before they look for pairs
    (GPT-2's, Llama 3's) cut too. Where there is no such place: after a line, or else between two characters.
    """
    if len(data) <= BLOCK:
        return len(data)
    ends = [found.end() for found in _LETTER_ENDS.finditer(data, BLOCK // 2, BLOCK)]
    if ends:
        return ends[-1]
    if (line := data.rfind(b"\n", BLOCK // 2, BLOCK)) >= 0:
        return line + 1
    at = BLOCK
    while at > BLOCK - 4 and data[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return at


def walk(
    root: Path, excluded: frozenset[str] = frozenset(), left_out: LeftOut | None = None
) -> list[tuple[bytes, Path]]:
    """(path below root as raw bytes, path) of each file below root, in the order of the former."""
    left_out = LeftOut() if left_out is None else left_out
    # fsencode gives back the bytes on disk, whatever the locale made of them.
    found = ((os.fsencode(path.relative_to(root).as_posix()), path) for path in _walk(root, excluded, left_out))
    return sorted(found)


def _walk(
    folder: Path, excluded: frozenset[str], left_out: LeftOut, above: frozenset[Path] = frozenset()
) -> Iterator[Path]:
    """Regular files below folder; links are followed, except to a folder we are in. No hidden files."""
    here = folder.resolve()
    if here in above:
        left_out.add("a link to a folder above", str(folder))
        return
    for entry in folder.iterdir():
        if entry.name in excluded:
            continue
        if entry.name.startswith("."):
            left_out.add("hidden", str(entry))
        elif entry.is_dir():
            yield from _walk(entry, excluded, left_out, above | {here})
        elif entry.is_file():
            yield entry
        else:
            left_out.add("no regular file", str(entry))


def told_apart(documents: Iterable[Document]) -> list[Document]:
    """Documents of one key get as many folders before it as tell them apart, so that each can fall into any split.

    a/train.txt, b/train.txt, c.txt -> a/train.txt, b/train.txt, c.txt;  c.txt alone -> c.txt
    """
    documents = list(documents)
    same: dict[bytes, list[Document]] = {}
    for document in documents:
        same.setdefault(document.key, []).append(document)
    keys: dict[int, bytes] = {}
    for group in same.values():
        longest, depth = max(len(document.above) for document in group), 0
        while depth < longest and len({_key(document, depth) for document in group}) < len(group):
            depth += 1
        keys |= {id(document): _key(document, depth) for document in group}
    return [Document(keys[id(document)], document.data) for document in documents]


def _key(document: Document, depth: int) -> bytes:
    folders = document.above[len(document.above) - depth :] if depth <= len(document.above) else document.above
    return b"/".join([*map(os.fsencode, folders), document.key])
