"""Reads files into one array of tokens for training and one for validation. A token is a byte of UTF-8 text, or with
data.tokenizer what that makes of it.

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
from moe_dist.config.values import index_prefix, user_path
from moe_dist.data.documents import UNREADABLE, Document, LeftOut, read_text, told_apart, walk
from moe_dist.data.index_writer import dtype_of
from moe_dist.data.indexed import read_indexed
from moe_dist.data.prepared import tokenizer_beside
from moe_dist.data.records import read_records
from moe_dist.data.stream import TokenStream
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.data.tokenizers import BYTES, ids_of, load_tokenizer

SEPARATOR = b"\0"
"""Follows each file of a corpus of several files, where tokens are bytes."""

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
    tokenizer: Tokenizer | None = None
    """None: nobody knows it."""
    lengths: tuple[list[int], list[int]] | None = None
    """indexed: tokens of each corpus in train and in validation."""
    sampled: list[str] = field(default_factory=list)
    """indexed: .bin files of which only parts were hashed."""

    @property
    def validation_share(self) -> float:
        return len(self.validation) / (len(self.train) + len(self.validation))

    def share_note(self, asked: float) -> str | None:
        """For a person, where the share is twice what data.validation_fraction asks for, or half of it."""
        share = self.validation_share
        if asked / 2 < share < 2 * asked:
            return None
        whole = "documents" if self.lengths is not None else self.made_of
        return (
            f"validation is {share:.1%} of the {self.unit}s, where data.validation_fraction={asked} asks for "
            f"{asked:.1%}: whole {whole} are held out, by a hash, and of few the share is a matter of chance; try "
            "another fraction"
        )

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

    Raises ValueError if a path is missing, unreadable or empty, if a token id does not fit vocab_size, if a split is
    too short, or for a tokenizer that cannot be read.
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
    tokenizer = load_tokenizer(config.tokenizer or BYTES, config.end_of_text)
    if tokenizer.kind == BYTES:
        _check_ids(documents, vocab_size)
    else:
        _check_vocabulary(tokenizer, config.tokenizer, vocab_size)
        documents = _decodable(documents, left_out)
    pieces = _split(documents, config.validation_fraction, keep_characters=tokenizer.kind != BYTES)
    tokens = {split: _tokens(data, len(documents) > 1, tokenizer) for split, data in pieces.items()}
    begins = np.cumsum([0, *map(len, tokens["train"])])[:-1]
    parts = {split: np.concatenate(data) for split, data in tokens.items()}
    for split, data in parts.items():
        _check_length(split, len(data), seq_len)
    return Corpus(
        train=parts["train"],
        validation=parts["validation"],
        vocab_size=vocab_size,
        name=name,
        digest=_digest({split: data.tobytes() for split, data in parts.items()}),
        num_files=len(documents),
        made_of="files" if config.kind in ("stdlib", "text") else "records",
        left_out=left_out,
        document_of=lambda offsets: np.searchsorted(begins, offsets, side="right") - 1,
        unit="byte" if tokenizer.kind == BYTES else "token",
        tokenizer=tokenizer,
    )


def _indexed(config: DataConfig, vocab_size: int, seq_len: int) -> Corpus:
    named = [*config.blend] or config.paths
    prefixes = [str(user_path(path)) for path in named]
    held_out = [str(user_path(path)) for path in config.validation_paths]
    tokenizer = _made_with([*prefixes, *held_out], config)
    found = read_indexed(prefixes, vocab_size, config.validation_fraction, held_out)
    for split, stream in (("train", found.train), ("validation", found.validation)):
        _check_length(split, len(stream), seq_len)
    for split, paths, lengths in zip(
        ("train", "validation"), (named, config.validation_paths or named), found.lengths, strict=True
    ):
        if config.blend or paths is config.validation_paths:  # no window has tokens of two
            for path, length in zip(paths, lengths, strict=True):
                _check_length(f"{path}: {split}", length, seq_len)
    digest = found.digest
    if config.blend:
        digest = hashlib.sha256(f"{digest} {list(config.blend.values())}".encode()).hexdigest()
    return Corpus(
        found.train,
        found.validation,
        vocab_size,
        name=", ".join(named),
        digest=digest,
        document_of=found.documents,
        num_files=len(prefixes) + len(held_out),
        unit="token",
        tokenizer=tokenizer,
        lengths=found.lengths,
        sampled=found.sampled,
    )


def _made_with(prefixes: list[str], config: DataConfig) -> Tokenizer | None:
    """The tokenizer of indexed corpora; None where one of them does not tell. Raises ValueError when they differ."""
    named = None if config.tokenizer is None else load_tokenizer(config.tokenizer, config.end_of_text)
    told = {}
    for prefix in prefixes:
        prefix = index_prefix(prefix)
        told[prefix] = tokenizer_beside(prefix)
    known = {prefix: tokenizer for prefix, tokenizer in told.items() if tokenizer is not None}
    first = named or next(iter(known.values()), None)
    for prefix, tokenizer in known.items():
        assert first is not None
        if tokenizer.digest != first.digest:
            other = f"data.tokenizer={config.tokenizer}" if named else next(iter(known))
            raise ValueError(f"{prefix} was made with another tokenizer than {other}: prepare it with that one")
    return first if named or len(known) == len(told) else None


def _check_vocabulary(tokenizer: Tokenizer, path: str | None, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} token ids, but model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size}"
        )


def _decodable(documents: list[Document], left_out: LeftOut) -> list[Document]:
    """Those in UTF-8; a tokenizer reads no other."""
    found = []
    for document in documents:
        try:
            document.data.decode("utf-8")
        except UnicodeDecodeError:
            left_out.add("not UTF-8", os.path.join(*document.above, os.fsdecode(document.key)))
        else:
            found.append(document)
    if not found:
        raise ValueError(f"none of {len(documents)} texts is UTF-8, as data.tokenizer needs them")
    return found


def _tokens(documents: list[bytes], ended: bool, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Of each document, with what ends it where there are several."""
    if tokenizer.kind == BYTES:
        return [np.frombuffer(data + SEPARATOR if ended else data, np.uint8) for data in documents]
    dtype = dtype_of(tokenizer.vocab_size)
    end = [tokenizer.end_id] if ended else []
    return [np.concatenate([ids_of(tokenizer, data), end]).astype(dtype) for data in documents]


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


def _split(documents: list[Document], fraction: float, keep_characters: bool) -> dict[str, list[bytes]]:
    """Cut a single file near its end, keep_characters: not inside one; sort several by a hash of their keys."""
    if len(documents) == 1:
        data = documents[0].data
        cut = int(len(data) * (1 - fraction))
        while keep_characters and 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:
            cut -= 1
        return {"train": [data[:cut]], "validation": [data[cut:]]}
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    held_out = round(fraction * 10_000)
    for document in documents:
        bucket = int.from_bytes(hashlib.sha256(document.key).digest(), "big") % 10_000
        split = "validation" if bucket < held_out else "train"
        parts[split].append(document.data)
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
