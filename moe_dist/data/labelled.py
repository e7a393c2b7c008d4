"""Labelled texts for classification, in three splits.

A text's split follows from its own characters alone, so it is the same on every machine and in any order of the
files. Texts that differ in white space only are one text: the first stays, so that none is in two splits.

Legend: N texts of a split, S sequence.
"""

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.config.schema import DataConfig
from moe_dist.data.records import read_records
from moe_dist.data.subwords import Subwords

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""The classes of the standard library: packages that every installation of CPython 3.11 to 3.13 has, none of them a
table of data."""

_TESTS = frozenset({"test", "tests", "__pycache__"})


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    where: str = ""
    """The file and line that it comes from."""


@dataclass(frozen=True)
class LabelledSplit:
    """tokens_NS: int64, 0 is padding. labels_N: int64, numbers of classes."""

    tokens_NS: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True)
class LabelledCorpus:
    """Three splits of tokenized texts, and what they were made of."""

    train: LabelledSplit
    validation: LabelledSplit
    test: LabelledSplit
    labels: tuple[str, ...]
    """Names of the classes, sorted."""
    subwords: Subwords
    name: str
    digest: str
    """SHA-256 of the three splits and the names of the classes."""
    num_copies: int
    """Texts left out as copies of others."""
    num_truncated: int
    """Texts longer than seq_len tokens, whose end was cut off."""

    @property
    def sizes(self) -> dict[str, int]:
        """Texts of each split."""
        return {name: len(getattr(self, name).labels_N) for name in ("train", "validation", "test")}

    def record(self) -> dict[str, Any]:
        """What is in it and what is not, as plain data."""
        sizes, whole = self.sizes, sum(self.sizes.values())
        return {
            "name": self.name,
            "texts": sizes,
            "validation_share": sizes["validation"] / whole,
            "test_share": sizes["test"] / whole,
            "truncated": self.num_truncated,
            "left_out": {"a copy": {"count": self.num_copies}} if self.num_copies else {},
        }


def load_labelled(config: DataConfig, vocab_size: int, seq_len: int) -> LabelledCorpus:
    """Read what `config` names, learn subwords on the training split, tokenize all.

    Raises ValueError if a file is missing or not as it should be, or a split is empty.
    """
    found = list(read_examples(config))
    name = f"stdlib-{platform.python_version()}" if config.kind == "stdlib" else ", ".join(config.paths)
    examples = unique(found)
    labels = tuple(sorted({example.label for example in examples}))
    if len(labels) < 2:
        raise ValueError(f"{name} has {len(labels)} labels {list(labels)}: classification needs at least two")
    parts = split(examples, config.validation_fraction, config.test_fraction)
    for part, members in parts.items():
        if not members:
            raise ValueError(f"none of {len(examples)} texts fell into the {part} split: give more texts")
    subwords = Subwords.learn([example.text for example in parts["train"]], vocab_size)
    number, truncated, splits = {label: index for index, label in enumerate(labels)}, 0, {}
    for part, members in parts.items():
        tokens_NS, cut = subwords.encode([example.text for example in members], seq_len)
        empty = np.flatnonzero(tokens_NS[:, 0] == 0)
        if len(empty):
            example = members[empty[0]]
            raise ValueError(f"{example.where or name}: the text {example.text!r} has no token: take it out")
        splits[part] = LabelledSplit(tokens_NS, np.array([number[example.label] for example in members]))
        truncated += cut
    digest = _digest(labels, splits)
    return LabelledCorpus(
        splits["train"],
        splits["validation"],
        splits["test"],
        labels,
        subwords,
        name,
        digest,
        len(found) - len(examples),
        truncated,
    )


def read_examples(config: DataConfig) -> Iterator[Example]:
    """All texts of the configuration, in order."""
    if config.kind == "stdlib":
        yield from stdlib_examples(config.block_lines)
        return
    for record in read_records(config.kind, config.paths):
        text, label = record.text(config.text_key, "text_key"), record.label(config.label_key)
        for value, key in ((text.strip(), config.text_key), (label, config.label_key)):
            if not value:
                raise ValueError(f"{record.where}: {key!r} is empty: fill it, or take the line out")
        yield Example(text, label, record.where)


def stdlib_examples(block_lines: int, root: Path | None = None) -> Iterator[Example]:
    """Every `block_lines` consecutive lines of each source of PACKAGES, labelled by the package. Empty lines and what
    is left at a file's end are left out. `root`: another folder of packages."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        files = [path for path in (root / package).rglob("*.py") if not _TESTS & set(path.relative_to(root).parts)]
        if not files:
            raise ValueError(f"no sources of {package} in {root}: set data.kind to jsonl or csv, and data.paths")
        for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
            lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            for first in range(0, len(lines) - block_lines + 1, block_lines):
                yield Example("\n".join(lines[first : first + block_lines]), package, str(path))


def split(examples: list[Example], validation: float, test: float) -> dict[str, list[Example]]:
    """Into train, validation and test by a hash of the text; `validation` and `test` are shares of the whole."""
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        place = int.from_bytes(_identity(example.text)[:8], "big") / 2**64
        part = "test" if place < test else "validation" if place < test + validation else "train"
        parts[part].append(example)
    return parts


def _identity(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", errors="surrogatepass")).digest()


def unique(examples: list[Example]) -> list[Example]:
    """The first of each set of texts that differ in white space only."""
    first: dict[bytes, Example] = {}
    for example in examples:
        first.setdefault(_identity(example.text), example)
    return list(first.values())


def _digest(labels: tuple[str, ...], splits: dict[str, LabelledSplit]) -> str:
    digest = hashlib.sha256(json.dumps(labels).encode())
    for part in splits.values():
        digest.update(repr(part.tokens_NS.shape).encode())
        digest.update(part.tokens_NS.tobytes())
        digest.update(part.labels_N.tobytes())
    return digest.hexdigest()
