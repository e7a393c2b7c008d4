"""Bytes as tokens: no vocabulary file, nothing out of vocabulary, and losses that compare across corpora."""

import math
from collections.abc import Iterable


class ByteTokenizer:
    """Token id = byte. Id 0 separates documents."""

    vocab_size = 256
    separator_id = 0

    def encode(self, text: str | bytes) -> list[int]:
        # surrogateescape: a prompt on the command line that is not UTF-8 becomes the bytes that were typed.
        return list(text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; what is not UTF-8, or not a byte (a larger vocab_size allows it), becomes U+FFFD."""
        # 0xFF occurs in no UTF-8 text. Negative ids raise ValueError.
        return bytes(min(int(i), 0xFF) for i in ids).decode("utf-8", errors="replace")


def bits_per_byte(nats: float, tokens: int, num_bytes: int) -> float:
    """nats * tokens / (ln 2 * num_bytes), from the mean loss in nats per token over `tokens` tokens."""
    if num_bytes < 1:
        raise ValueError(f"num_bytes={num_bytes} must be at least 1: bits per byte of no text are undefined")
    return nats * tokens / (math.log(2) * num_bytes)
