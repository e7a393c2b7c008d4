"""Reads files into one array of tokens for training and one for validation. A token is a byte of UTF-8 text.

A corpus is the same bytes on every rank and in every run: files are ordered and split by their names alone, never by
the order in which the file system lists them, nor by the locale or Python's hash seed. Its digest says so.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_dist.config.schema import DataConfig
from moe_dist.config.values import user_path
from moe_dist.data.documents import UNREADABLE, Document, LeftOut, read_text, told_apart, walk
from moe_dist.data.indexed import read_indexed
from moe_dist.data.records import read_records
from moe_dist.data.stream import TokenStream

SEPARATOR = b"\0"
"""Follows each file of a corpus of several files."""

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Two splits of token ids, and what they were made of."""

    train: np.ndarray | TokenStream
    validation: np.ndarray | TokenStream
    vocab_size: int
    name: str
    digest: str
    """SHA-256 of both splits and their lengths."""
    document_of: Callable[[np.ndarray], np.ndarray]
    """Offsets of tokens in the training split -> the numbers of the documents that hold them. A document is a file, a
    record, or what an index calls so."""
    num_files: int
    """Files in the two splits; indexed: pairs of files; jsonl, csv: records."""
    made_of: Literal["files", "records"] = "files"
    left_out: LeftOut = field(default_factory=LeftOut)
    unit: Literal["byte", "token"] = "byte"
    """What a token is. The loss is told in bits per unit."""

    @property
    def validation_share(self) -> float:
        return len(self.validation) / (len(self.train) + len(self.validation))

    def record(self) -> dict[str, Any]:
        """What is in it and what is not, as plain data."""
        return {
            "name": self.name,
            self.made_of: self.num_files,
            "tokens": {"train": len(self.train), "validation": len(self.validation)},
            "validation_share": self.validation_share,
            "left_out": self.left_out.record(),
        }


def load_corpus(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    """Read the corpus that `config` names; each split holds at least one sequence of seq_len tokens and its targets.

    Raises ValueError if a path is missing, unreadable or empty, if a token id does not fit vocab_size, or if a split
    is too short.
    """
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1, e.g. 0.1")
    if config.kind == "indexed":
        return _indexed(config, vocab_size, seq_len)
    left_out, name = LeftOut(), ", ".join(config.paths)
    if config.kind == "stdlib":
        name = f"stdlib-{platform.python_version()}"
        found = _stdlib(left_out)
    elif config.kind == "text":
        found = _text(config.paths, left_out)
    else:
        found = _records(config, left_out)
    documents = told_apart(_unique(found, left_out))
    _check_ids(documents, vocab_size)
    pieces = _split(documents, config.validation_fraction)
    begins = np.cumsum([0, *map(len, pieces["train"])])[:-1:2]  # a separator belongs to the document before it
    parts = {split: b"".join(data) for split, data in pieces.items()}
    for split, data in parts.items():
        _check_length(split, len(data), seq_len)
    return Corpus(
        train=np.frombuffer(parts["train"], np.uint8),
        validation=np.frombuffer(parts["validation"], np.uint8),
        vocab_size=vocab_size,
        name=name,
        digest=_digest(parts),
        num_files=len(documents),
        made_of="files" if config.kind in ("stdlib", "text") else "records",
        left_out=left_out,
        document_of=lambda offsets: np.searchsorted(begins, offsets, side="right") - 1,
    )


def _indexed(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    prefixes = [str(user_path(path)) for path in config.paths]
    train, validation, digest, document_of = read_indexed(prefixes, vocab_size, config.validation_fraction)
    for split, stream in (("train", train), ("validation", validation)):
        _check_length(split, len(stream), seq_len)
    name = ", ".join(config.paths)
    return Corpus(train, validation, vocab_size, name, digest, document_of, len(config.paths), unit="token")


def _stdlib(left_out: LeftOut) -> list[Document]:
    """The sources of the standard library as they are, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    try:
        found = walk(root, _NOT_STDLIB)
    except OSError as error:
        raise ValueError(f"{root}, the standard library, cannot be read: {error}") from error
    for key, path in found:
        if path.suffix != ".py":
            continue
        try:
            data, reason = path.read_bytes(), "empty"
        except OSError:
            data, reason = b"", "unreadable"
        if data:
            documents.append(Document(key, data))
        else:
            left_out.add(reason, os.fsdecode(key))
    if not documents:
        raise ValueError(f"no Python sources in {root}: set data.kind to text and data.paths to files of yours")
    return documents


def _text(paths: list[str], left_out: LeftOut) -> list[Document]:
    """Files in the order given, folders in the order of their files' paths."""
    if not paths:
        raise ValueError("data.kind=text needs data.paths, which is empty: name at least one file or folder")
    documents: list[Document] = []
    for path in map(user_path, paths):
        try:
            if path.is_dir():
                documents += _folder(path, left_out)
            elif path.is_file():
                data, reason = read_text(path)
                if reason is not None:
                    raise ValueError(f"{path} in data.paths has no text, it is {reason}: remove it")
                documents.append(Document(os.fsencode(path.name), data, path.parent.parts))
            else:
                raise ValueError(f"{path} in data.paths is neither a file nor a folder (looked from {Path.cwd()})")
        except UNREADABLE as error:
            raise ValueError(f"{path} in data.paths cannot be read: {error}") from error
    return documents


def _folder(folder: Path, left_out: LeftOut) -> list[Document]:
    documents, here = [], LeftOut()
    for key, path in walk(folder, left_out=here):
        try:
            data, reason = read_text(path)
        except UNREADABLE as error:
            raise ValueError(f"{folder} in data.paths cannot be read: {error}: {str(path)!r}") from error
        if reason is None:
            documents.append(Document(key, data, folder.parts))
        else:
            here.add(reason, str(path))
    if not documents:
        raise ValueError(f"{folder} in data.paths has no text ({here.describe() or 'no files'}): remove it")
    for reason, names in here.names.items():
        for name in names:
            left_out.add(reason, name)
    return documents


def _records(config: DataConfig, left_out: LeftOut) -> list[Document]:
    """The texts of records; which split one falls into depends on the text alone."""
    documents = []
    for record in read_records(config.kind, config.paths):
        data = record.text(config.text_key, "text_key").encode("utf-8")
        if data:
            documents.append(Document(data, data, (record.where,)))
        else:
            left_out.add("empty", record.where)
    if not documents:
        raise ValueError(f"{', '.join(config.paths)} in data.paths has no text at {config.text_key!r}")
    return documents


def _unique(documents: list[Document], left_out: LeftOut) -> list[Document]:
    """The first of each set of equal texts, lest one be in both splits."""
    first: dict[bytes, Document] = {}
    for document in documents:
        if first.setdefault(hashlib.sha256(document.data).digest(), document) is not document:
            named = document.key != document.data
            left_out.add("a copy", os.path.join(*document.above, *([os.fsdecode(document.key)] if named else [])))
    return list(first.values())


def _split(documents: list[Document], fraction: float) -> dict[str, list[bytes]]:
    """Cut a single file near its end; sort several into the splits by a hash of their keys, each before a SEPARATOR."""
    if len(documents) == 1:
        data = documents[0].data
        cut = int(len(data) * (1 - fraction))
        return {"train": [data[:cut]], "validation": [data[cut:]]}
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
    return parts


def _check_ids(documents: list[Document], vocab_size: int) -> None:
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
