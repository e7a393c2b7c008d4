"""Words and parts of words as tokens, learnt from the training texts by byte-pair encoding (arXiv 1508.07909).

The `tokenizers` package does the work; its file, tokenizer.json, is what a trained classifier needs beside its weights.

Legend: N texts, S sequence.
"""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.trainers import BpeTrainer

PADDING, UNKNOWN = "[PAD]", "[UNK]"


class Subwords:
    """Text -> ids. Id 0 is padding, 1 what no subword covers. White space separates and is not kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @staticmethod
    def learn(texts: list[str], vocab_size: int) -> "Subwords":
        """At most vocab_size ids; fewer where the texts hold fewer pairs. The same texts give the same ids."""
        if vocab_size < 3:
            raise ValueError(f"vocab_size={vocab_size} holds no subword beside padding and unknown: raise it")
        tokenizer = Tokenizer(BPE(unk_token=UNKNOWN))
        # Identifiers end at an underscore, numbers are apart from words, every other character stands alone.
        pieces = Split(Regex(r"[^\W\d_]+|\d+|_|[^\w\s]"), behavior="isolated")
        tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), pieces])
        alphabet = min(vocab_size - 2, 1000)
        trainer = BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PADDING, UNKNOWN], limit_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return Subwords(tokenizer)

    @staticmethod
    def load(path: Path) -> "Subwords":
        """Raises ValueError when the file cannot be read."""
        try:
            return Subwords(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(f"{path}: not a tokenizer that can be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def dumps(self) -> str:
        """The contents of tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def encode(self, texts: list[str], seq_len: int) -> tuple[np.ndarray, int]:
        """(ids [N, S] int64, padded with 0; how many texts were longer and lost their end)."""
        ids_NS, truncated = np.zeros((len(texts), seq_len), np.int64), 0
        for row, encoded in zip(ids_NS, self._tokenizer.encode_batch(texts), strict=True):
            ids = encoded.ids[:seq_len]
            row[: len(ids)] = ids
            truncated += len(encoded.ids) > seq_len
        return ids_NS, truncated
