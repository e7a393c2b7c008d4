"""Reads files into one array of tokens for training and one for validation. Text is bytes: nothing here decodes it.

A corpus is the same bytes on every rank and in every run: files are ordered and split by their names alone, never by
the order in which the file system lists them, nor by the locale or Python's hash seed. Its digest says so.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_dist.config.schema import DataConfig
from moe_dist.config.values import user_path
from moe_dist.data.indexed import read_indexed
from moe_dist.data.stream import TokenStream

SEPARATOR = b"\0"
"""Follows each file of a corpus of several files."""

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_SNIFFED = 8192


@dataclass(frozen=True)
class Corpus:
    """Two splits of token ids, and what they were made of."""

    train: np.ndarray | TokenStream
    validation: np.ndarray | TokenStream
    vocab_size: int
    name: str
    digest: str
    """SHA-256 of both splits and their lengths."""
    num_files: int
    """Files in the two splits; indexed: pairs of files."""
    num_skipped: int = 0
    """Files left out: empty, binary, unreadable (stdlib only), or a copy of another."""
    unit: Literal["byte", "token"] = "byte"
    """What a token is. The loss is told in bits per unit."""


@dataclass(frozen=True)
class _Document:
    key: bytes
    """The path below the corpus' root, as raw bytes: what order and split depend on."""
    data: bytes


def load_corpus(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    """Read the corpus that `config` names; each split holds at least one sequence of seq_len tokens and its targets.

    Raises ValueError if a path is missing, unreadable or empty, if a token id does not fit vocab_size, or if a split
    is too short.
    """
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1, e.g. 0.1")
    if config.kind == "indexed":
        return _indexed(config, vocab_size, seq_len)
    if config.kind == "stdlib":
        name = f"stdlib-{platform.python_version()}"
        found, skipped = _stdlib()
    else:
        name = ", ".join(config.paths)
        found, skipped = _text(config.paths)
    documents = _unique(found)
    _check_ids(documents, vocab_size)
    parts = _split(documents, config.validation_fraction)
    for split, data in parts.items():
        _check_length(split, len(data), seq_len)
    return Corpus(
        train=np.frombuffer(parts["train"], np.uint8),
        validation=np.frombuffer(parts["validation"], np.uint8),
        vocab_size=vocab_size,
        name=name,
        digest=_digest(parts),
        num_files=len(documents),
        num_skipped=skipped + len(found) - len(documents),
    )


def _indexed(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    prefixes = [str(user_path(path)) for path in config.paths]
    train, validation, digest = read_indexed(prefixes, vocab_size, config.validation_fraction)
    for split, stream in (("train", train), ("validation", validation)):
        _check_length(split, len(stream), seq_len)
    name = ", ".join(config.paths)
    return Corpus(train, validation, vocab_size, name, digest, len(config.paths), unit="token")


def _stdlib() -> tuple[list[_Document], int]:
    """The sources of the standard library, without its tests, and the number of files skipped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, skipped = [], 0
    try:
        found = _files(root, _NOT_STDLIB)
    except OSError as error:
        raise ValueError(f"{root}, the standard library, cannot be read: {error}") from error
    for key, path in found:
        if path.suffix != ".py":
            continue
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        if data:
            documents.append(_Document(key, data))
        else:
            skipped += 1
    if not documents:
        raise ValueError(f"no Python sources in {root}: set data.kind to text and data.paths to files of yours")
    return documents, skipped


def _text(paths: list[str]) -> tuple[list[_Document], int]:
    """Files in the order given, folders in the order of their files' paths; and the number of files skipped."""
    if not paths:
        raise ValueError("data.kind=text needs data.paths, which is empty: name at least one file or folder")
    documents, skipped = [], 0
    for path in map(user_path, paths):
        try:
            if path.is_dir():
                read = [_Document(key, _read_unless_binary(file)) for key, file in _files(path)]
                kept = [document for document in read if document.data]
                skipped += len(read) - len(kept)
            elif path.is_file():
                read = kept = [_Document(os.fsencode(path.name), path.read_bytes())]
            else:
                raise ValueError(f"{path} in data.paths is neither a file nor a folder (looked from {Path.cwd()})")
        except OSError as error:
            raise ValueError(f"{path} in data.paths cannot be read: {error}") from error
        if not any(document.data for document in kept):
            raise ValueError(f"{path} in data.paths has no text ({len(read)} files, empty or binary): remove it")
        documents += kept
    return documents, skipped


def _read_unless_binary(path: Path) -> bytes:
    """The bytes of a file, or none if it looks binary, as a NUL near its start tells."""
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
        if b"\0" in head:
            return b""
        size = os.fstat(file.fileno()).st_size
        data = head + file.read()
        if len(data) != size or os.fstat(file.fileno()).st_size != size:
            raise OSError(f"{path} changes while it is read")
        return data


def _files(root: Path, excluded: frozenset[str] = frozenset()) -> list[tuple[bytes, Path]]:
    """(key, path) of each file below root, ordered by key."""
    # fsencode gives back the bytes on disk, whatever the locale made of them.
    found = ((os.fsencode(path.relative_to(root).as_posix()), path) for path in _walk(root, excluded))
    return sorted(found)


def _walk(folder: Path, excluded: frozenset[str], above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Regular files below folder; links are followed, except to a folder we are in. No hidden files."""
    here = folder.resolve()
    if here in above:
        return
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name in excluded:
            continue
        if entry.is_dir():
            yield from _walk(entry, excluded, above | {here})
        elif entry.is_file():
            yield entry


def _unique(documents: list[_Document]) -> list[_Document]:
    """The first of each set of equal files, lest one be in both splits."""
    first: dict[bytes, _Document] = {}
    for document in documents:
        first.setdefault(hashlib.sha256(document.data).digest(), document)
    return list(first.values())


def _split(documents: list[_Document], fraction: float) -> dict[str, bytes]:
    """Cut a single file near its end; sort several into the splits by a hash of their keys."""
    if len(documents) == 1:
        data = documents[0].data
        cut = int(len(data) * (1 - fraction))
        return {"train": data[:cut], "validation": data[cut:]}
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    held_out = round(fraction * 10_000)
    for document in documents:
        bucket = int.from_bytes(hashlib.sha256(document.key).digest(), "big") % 10_000
        split = "validation" if bucket < held_out else "train"
        parts[split] += [document.data, SEPARATOR]
    for split, verb in (("train", "lower"), ("validation", "raise")):
        if not parts[split]:
            raise ValueError(
                f"none of the {len(documents)} files fell into the {split} split with "
                f"data.validation_fraction={fraction}: {verb} it, or add files to data.paths"
            )
    return {split: b"".join(data) for split, data in parts.items()}


def _check_ids(documents: list[_Document], vocab_size: int) -> None:
    largest, key = max((int(np.frombuffer(d.data, np.uint8).max()), d.key) for d in documents)
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} in {os.fsdecode(key)} needs model.vocab_size > {largest}, but it is {vocab_size}: "
            "256 fits every byte"
        )


def _check_length(split: str, num_tokens: int, seq_len: int) -> None:
    if num_tokens < seq_len + 1:
        verb = "raise" if split == "validation" else "lower"
        raise ValueError(
            f"{split} has {num_tokens} tokens, but seq_len={seq_len} needs at least {seq_len + 1}: "
            f"lower train.seq_len, {verb} data.validation_fraction, or add text to data.paths"
        )


def _digest(parts: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for data in parts.values():
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
