"""What a worker does with a block: records to texts, texts to ids. A worker holds a tokenizer and nothing else."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moe_dist.data.documents import BLOCK
from moe_dist.data.index_writer import dtype_of
from moe_dist.data.prepare.blocks import Block, Row
from moe_dist.data.prepare.sources import Kind
from moe_dist.data.records import json_record, text_at
from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer
from moe_dist.data.tokenizers import ids_of, load_tokenizer

_TOGETHER = 1 << 18
"""Characters that are handed to a tokenizer at once: what it says of a token takes a hundred bytes."""


@dataclass(frozen=True)
class Encoded:
    """tokens: as bytes of the index's type. lengths: int64, of documents with what ends them. bad, empty: (line, why)
    of records that are not in it."""

    tokens: bytes
    lengths: np.ndarray
    bad: list[tuple[int, str]] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)


class Encoder:
    """text_key: where a record's text is."""

    def __init__(self, tokenizer: Tokenizer, text_key: str) -> None:
        self.tokenizer = tokenizer
        self.text_key = text_key
        self.dtype = dtype_of(tokenizer.vocab_size)

    def encode(self, kind: Kind, block: Block) -> Encoded:
        if kind == "text":
            assert isinstance(block.data, bytes)
            return self._part_of_text(block, block.data)
        bad: list[tuple[int, str]] = []
        empty: list[int] = []
        texts = []
        for line, text, problem in texts_of(kind, block, self.text_key):
            if problem:
                bad.append((line, problem))
            elif text:
                texts.append(text)
            else:
                empty.append(line)
        found = [self._array(ids) for ids in self._encoded(texts)]
        lengths = np.array([len(ids) for ids in found], np.int64)
        return Encoded(b"".join(ids.tobytes() for ids in found), lengths, bad, empty)

    def _encoded(self, texts: list[str]) -> Iterator[list[int]]:
        """Ids of each text, with what ends it."""
        held: list[str] = []
        size, end = 0, self.tokenizer.end_id
        for text in texts:
            if len(text) > BLOCK // 4:
                yield from self._together(held)
                held, size = [], 0
                yield [*ids_of(self.tokenizer, text.encode()).tolist(), end]
                continue
            held.append(text)
            size += len(text)
            if size > _TOGETHER:
                yield from self._together(held)
                held, size = [], 0
        yield from self._together(held)

    def _together(self, texts: list[str]) -> Iterator[list[int]]:
        for ids in self.tokenizer.encode_all(texts) if texts else []:
            ids.append(self.tokenizer.end_id)
            yield ids

    def _part_of_text(self, block: Block, data: bytes) -> Encoded:
        """A document may have many parts."""
        if block.ends and block.place.at == 0:
            return Encoded(b"", np.zeros(0, np.int64), empty=[1])
        if isinstance(self.tokenizer, ByteTokenizer):
            ids = np.frombuffer(data, np.uint8).astype(self.dtype)
        else:
            ids = self._array(self.tokenizer.encode(data.decode("utf-8")))
        if block.ends:
            ids = np.append(ids, self.dtype.type(self.tokenizer.end_id))
        return Encoded(ids.tobytes(), np.array([len(ids)], np.int64))

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.array(ids, self.dtype)


def texts_of(kind: Kind, block: Block, text_key: str) -> Iterator[tuple[int, str, str]]:
    """(line, text, "") of each record, or (line, "", why there is none). The part of a text is one record."""
    if kind == "text":
        assert isinstance(block.data, bytes)
        yield 1, block.data.decode("utf-8", errors="replace"), ""
        return
    for row in _rows(block, text_key):
        text, problem = "", row.problem
        if not problem:
            try:
                text = text_at({text_key: row.text}, text_key, "mend it, or set --text-key")
            except ValueError as error:
                problem = str(error)
        yield row.line, text, problem


def _rows(block: Block, text_key: str) -> Iterator[Row]:
    if not isinstance(block.data, bytes):
        yield from block.data
        return
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        if not line.strip():
            continue
        try:
            values = json_record(line)
        except ValueError as error:
            yield Row(number, problem=str(error))
            continue
        if text_key in values:
            yield Row(number, values[text_key])
        else:
            yield Row(number, problem=f"nothing at {text_key!r}, but {', '.join(values)}")


_encoder: list[Encoder] = []  # of this process: a pool calls functions, and has no other place for what they share


def start_worker(tokenizer: str, end_of_text: str | None, text_key: str) -> None:
    """Of a process of its own, once. Ctrl-C is its parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as cores already
    _encoder.append(Encoder(load_tokenizer(tokenizer, end_of_text), text_key))


def encode_in_worker(kind: Kind, block: Block) -> Encoded:
    return _encoder[0].encode(kind, block)
