"""How often each token is in the training split, as a few classes of token ids.

From the most frequent id down (equal counts: the smaller id first), each of FREQUENCIES classes takes ids until it has
its share of the tokens that are left: one in as many as there are classes left. So every class has about as many
tokens, and where one id makes up more (a blank is a quarter of Python's sources) it is a class of its own and the
others share the rest. An id is in one class as a whole. Class 0 are the rarest ids, and those that were never seen.

Of a split of more than SAMPLE tokens, as many in windows spread evenly over it are counted, the same in every run and
on every rank.

Legend: V token ids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_dist.data.stream import TokenStream
from moe_dist.moe.drops import FREQUENCIES

SAMPLE = 1 << 22
_WINDOW = 1 << 14


@dataclass(frozen=True)
class Frequencies:
    """classes_V: int64, from 0 for the rarest to FREQUENCIES - 1. counts_V: what it was made of."""

    classes_V: np.ndarray
    counts_V: np.ndarray

    @staticmethod
    def of(counts_V: np.ndarray) -> "Frequencies":
        """counts_V: int64, not all zero."""
        order = np.argsort(-counts_V, kind="stable")
        upto = np.cumsum(counts_V[order])  # tokens of the ids so far
        classes_V, first, taken = np.zeros_like(order), 0, 0
        for number in range(FREQUENCIES - 1, 0, -1):
            wanted = taken + -(-(int(upto[-1]) - taken) // (number + 1))
            end = int(np.searchsorted(upto, wanted)) + 1
            classes_V[order[first:end]] = number
            first, taken = end, int(upto[end - 1])
            if taken == upto[-1]:
                break
        return Frequencies(classes_V, counts_V)

    def record(self) -> dict[str, Any]:
        """How many tokens were counted, and of each class: how many ids it has, and how many of these tokens."""
        counted = self.counts_V.sum()
        tokens = np.bincount(self.classes_V, weights=self.counts_V, minlength=FREQUENCIES)
        ids = np.bincount(self.classes_V, minlength=FREQUENCIES)
        return {"counted": int(counted), "ids": ids.tolist(), "tokens": tokens.astype(np.int64).tolist()}


def token_counts(split: np.ndarray | TokenStream, vocab_size: int, sample: int = SAMPLE) -> np.ndarray:
    """Of each id, int64 [V]: how often it is among at most about `sample` tokens of the split."""
    length = len(split)
    if length <= sample:
        starts = np.arange(0, length, _WINDOW)
    else:
        windows = max(1, sample // _WINDOW)
        starts = np.arange(windows, dtype=np.int64) * (length - _WINDOW) // max(1, windows - 1)
    counts_V = np.zeros(vocab_size, np.int64)
    for start in starts.tolist():
        counts_V += np.bincount(split[np.arange(start, min(start + _WINDOW, length))], minlength=vocab_size)
    return counts_V
