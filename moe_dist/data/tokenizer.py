"""What a tokenizer is, and bytes as tokens: no vocabulary file, nothing out of vocabulary.

Tokenizers that are read from files are in tokenizers.py.

Legend: V token ids.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
"""The token that ends a document, in tokenizers of ours."""


class Tokenizer(Protocol):
    """Text to ids and back.

    kind: what it is read with. vocab_size: one more than its largest id. end_id: the token that ends a document.
    digest: SHA-256 of all that decides an id. files: by name, what a folder must hold to be this tokenizer again.
    """

    kind: str
    vocab_size: int
    end_id: int
    digest: str
    files: Mapping[str, bytes]

    def encode(self, text: str) -> list[int]:
        """Without tokens around it. Raises ValueError for text that it has no ids for."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Bytes that are no UTF-8 become U+FFFD."""

    def bytes_per_token(self) -> np.ndarray | None:
        """int64 [V]: how many bytes of UTF-8 text each id stands for; 0 for those that stand for no text. None where
        that hangs on the neighbours."""


class ByteTokenizer:
    """Token id = byte. Id 0 separates documents."""

    kind = "bytes"
    vocab_size = 256
    separator_id = end_id = 0
    digest = hashlib.sha256(b"bytes").hexdigest()
    files: Mapping[str, bytes] = {}

    def encode(self, text: str | bytes) -> list[int]:
        # surrogateescape: a prompt on the command line that is not UTF-8 becomes the bytes that were typed.
        return list(text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is not UTF-8, or not a byte (a larger vocab_size allows it), becomes U+FFFD."""
        # 0xFF occurs in no UTF-8 text. Negative ids raise ValueError.
        return bytes(min(int(i), 0xFF) for i in ids).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> np.ndarray:
        return np.ones(256, np.int64)


class GrowingText:
    """The text of ids that come one by one. A character is told when all of its bytes are there.

    Tokens are decoded together with those of the word before, since what an id stands for may hang on its neighbours: a
    blank at the start of a text is left out by some tokenizers.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # of the ids, those whose text was given

    def add(self, token: int) -> str:
        """What is new and complete; often nothing."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[: self._told])
        now = self._tokenizer.decode(self._ids)
        if now.endswith("\ufffd") and len(self._ids) - self._told < 8:  # more bytes may be coming
            return ""
        del self._ids[: self._told]
        self._told = len(self._ids)
        return now[len(before) :]

    def end(self) -> str:
        """What was not complete when nothing followed."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._tokenizer.decode(self._ids[: self._told])) :]


def bits_per_byte(nats: float, tokens: int, num_bytes: int) -> float:
    """nats * tokens / (ln 2 * num_bytes), from the mean loss in nats per token over `tokens` tokens."""
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes} must be at least 1: bits per byte of no text are undefined")
    return nats * tokens / (math.log(2) * num_bytes)
