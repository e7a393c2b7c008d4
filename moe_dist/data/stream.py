"""Tokens at any offsets, from arrays and from files that are read where they lie.

Without a memory map: where a mapped file has become shorter, the kernel gives zeros, or kills the process without a
word.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate, pairwise

import numpy as np

_MOST_OPEN = 256  # of the 1,024 that a process may usually open
_PUT_BACK = "put it back as it was, and continue with --resume"


@dataclass(frozen=True)
class CheckedFile:
    """A file as it was when every byte of it was looked at."""

    path: str
    inode: int
    size: int
    written_ns: int

    @staticmethod
    def of(file: BufferedReader) -> "CheckedFile":
        now = os.fstat(file.fileno())
        return CheckedFile(file.name, now.st_ino, now.st_size, now.st_mtime_ns)


class OpenFiles:
    """The files that were read last, at most `most` of them: a corpus may have more than a process may hold open."""

    def __init__(self, most: int = _MOST_OPEN) -> None:
        self.most = most
        self._files: dict[str, BufferedReader] = {}  # the one read longest ago comes first

    def descriptor(self, checked: CheckedFile) -> int:
        """Raises OSError when the file is not there any more, or no longer the one that was checked."""
        file = self._files.pop(checked.path, None) or self._opened(checked)
        self._files[checked.path] = file
        return file.fileno()

    def _opened(self, checked: CheckedFile) -> BufferedReader:
        while len(self._files) >= self.most:
            self._files.pop(next(iter(self._files))).close()
        file = open(checked.path, "rb")  # noqa: SIM115 (closed above, or with the corpus)
        if CheckedFile.of(file) != checked:
            file.close()
            raise OSError(f"{checked.path} has changed since the run began: {_PUT_BACK}")
        return file


class StoredTokens:
    """Tokens [first, last) of a file. One system call for each run of offsets that follow each other.

    vocab_size: what ids must be below, where not every token was looked at before.
    """

    def __init__(
        self,
        files: OpenFiles,
        file: CheckedFile,
        dtype: np.dtype,
        first: int,
        last: int,
        vocab_size: int | None = None,
    ) -> None:
        self.files = files
        self.file = file
        self.dtype = dtype
        self.first = first
        self.last = last
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, offsets_N: np.ndarray) -> np.ndarray:
        """Raises OSError when the file has become shorter, or was replaced while it was not open; ValueError for an id
        that the vocabulary does not have."""
        descriptor = self.files.descriptor(self.file)
        tokens_N = np.empty(len(offsets_N), self.dtype)
        data, size = tokens_N.view(np.uint8).data, self.dtype.itemsize
        breaks = np.flatnonzero(np.diff(offsets_N) != 1) + 1
        for begin, end in pairwise([0, *breaks.tolist(), len(offsets_N)]):
            at, done = (self.first + int(offsets_N[begin])) * size, begin * size
            while done < end * size:
                read = os.preadv(descriptor, [data[done : end * size]], at + done - begin * size)
                if read == 0:
                    raise OSError(f"{self.file.path} has become shorter since the run began: {_PUT_BACK}")
                done += read
        if self.vocab_size is not None and len(tokens_N):
            self._check(tokens_N, offsets_N)
        return tokens_N

    def _check(self, tokens_N: np.ndarray, offsets_N: np.ndarray) -> None:
        wrong_N = (tokens_N < 0) | (tokens_N >= self.vocab_size)
        if wrong_N.any():
            at = int(wrong_N.argmax())
            raise ValueError(
                f"{self.file.path}: token id {tokens_N[at]} at offset {self.first + offsets_N[at]} is not within "
                f"model.vocab_size={self.vocab_size}: raise it, or encode the text with the tokenizer of this model"
            )


class TokenStream:
    """Arrays of tokens, one after the other, read at the offsets asked for."""

    def __init__(self, parts: Sequence[np.ndarray | StoredTokens]) -> None:
        self.parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, offsets: np.ndarray) -> np.ndarray:
        """int64 tokens at an array of offsets, in its shape."""
        tokens = np.empty(offsets.shape, np.int64)
        which = np.searchsorted(self._starts, offsets, side="right") - 1
        for number in np.unique(which):
            here = which == number
            tokens[here] = self.parts[number][offsets[here] - self._starts[number]]
        return tokens
