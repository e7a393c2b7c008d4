"""Which sequences are seen at which step, by which rank: a pure function of (seed, step), so the step is all the
state a resumed run needs, and the layout is no part of it.

`B` batch · `S` sequence
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from moe_dist.data.permutation import ROUNDS, permuted
from moe_dist.data.stream import TokenStream

LISTED = 1 << 20
"""Windows of an epoch up to which their order is a list."""


class SequenceSampler:
    """Visits the windows of a split in a new order each epoch, each exactly once.

    Epoch k cuts the split into `windows_per_epoch` windows that start at phase_k + i * seq_len. The phase and the
    order come from random bits keyed by (seed, k). Every phase has the same number of windows, at most one fewer than
    the split could hold, so that a step's epoch is one division; which bytes are left out changes with the phase.

    Up to LISTED windows the order is a list, sorted by a random number for each. Of more it is computed for the windows
    of the step at hand (permutation.py): a list of 73 million, 3e11 tokens, takes a minute and 1.2 GB on every rank.
    """

    def __init__(self, num_tokens: int, seq_len: int, global_batch: int, seed: int, key: tuple[int, ...] = ()) -> None:
        """key: tells samplers of one seed apart."""
        _check_window(num_tokens, seq_len)
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative: it keys a random generator")
        self.seq_len = seq_len
        self.global_batch = global_batch
        self.seed = seed
        self.key = key
        self.windows_per_epoch = max(1, (num_tokens - seq_len) // seq_len)
        # A window is seq_len tokens and one more, the last target.
        self.num_phases = min(seq_len, num_tokens - self.windows_per_epoch * seq_len)
        self._epochs: dict[int, _Epoch] = {}

    def indices(self, step: int) -> np.ndarray:
        """Start offsets [global_batch] int64 of the sequences of optimizer step `step`, counted from 0."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative: the first step is 0")
        return self.starts(np.arange(step * self.global_batch, (step + 1) * self.global_batch))

    def starts(self, numbers_N: np.ndarray) -> np.ndarray:
        """Start offsets, int64, of sequences by their numbers, counted from 0 over all epochs; in rising order."""
        if len(numbers_N) == 0:
            return np.zeros(0, np.int64)
        epoch_N, place_N = np.divmod(numbers_N, self.windows_per_epoch)
        wanted, first = np.unique(epoch_N, return_index=True)
        self._epochs = {k: self._epochs.get(k) or self._epoch(k) for k in wanted.tolist()}
        places = np.split(place_N, first[1:])
        windows = [
            epoch.phase + epoch.order(some) * self.seq_len
            for epoch, some in zip(self._epochs.values(), places, strict=True)
        ]
        return np.concatenate(windows)

    def _epoch(self, number: int) -> "_Epoch":
        # Raw bits and a stable sort, not Generator.permutation: NumPy keeps only the former across its versions.
        random = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(*self.key, number)))
        size = self.windows_per_epoch
        listed = size <= LISTED
        bits = random.random_raw(1 + (size if listed else ROUNDS))
        phase = int(bits[0]) % self.num_phases
        if listed:
            return _Epoch(phase, np.argsort(bits[1:], kind="stable").astype(np.int64).take)
        return _Epoch(phase, partial(permuted, size=size, keys=bits[1:].tolist()))


@dataclass(frozen=True)
class _Epoch:
    phase: int
    order: Callable[[np.ndarray], np.ndarray]
    """Places, counted from 0 -> the windows that are visited there."""


def rank_starts(starts: np.ndarray, accumulation: int, dp: int, dp_rank: int, micro_step: int) -> np.ndarray:
    """The starts of one rank in one micro-step, out of those of an optimizer step, laid out [accumulation, dp, micro].

    With accumulation fixed, a micro-step is the same sequences in the same order for every dp.
    """
    if len(starts) % (accumulation * dp):
        raise ValueError(
            f"global_batch={len(starts)} must be a multiple of accumulation * dp = {accumulation} * {dp}: "
            "change one of the three"
        )
    assert 0 <= dp_rank < dp and 0 <= micro_step < accumulation
    return starts.reshape(accumulation, dp, -1)[micro_step, dp_rank]


def micro_batch(split: np.ndarray | TokenStream, starts: np.ndarray, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and next-token targets, both [B, S] int64, of the windows at `starts`."""
    windows = torch.from_numpy(split[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def validation_starts(num_tokens: int, seq_len: int, limit: int) -> np.ndarray:
    """Starts of at most `limit` windows, evenly spread over the split, without overlap: the same at every call."""
    _check_window(num_tokens, seq_len)
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1: raise run.eval_sequences")
    available = (num_tokens - 1) // seq_len
    count = min(limit, available)
    return np.arange(count, dtype=np.int64) * available // count * seq_len


def validation_batches(
    num_tokens: int, seq_len: int, limit: int, batch: int, dp: int, dp_rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(starts, weights) of this rank's batches, each [batch]; equally many on every rank.

    Each window has weight 1 on exactly one rank. Weight 0 marks padding (a repeat of the first window): the loss of
    the split is sum(weights * losses) / sum(weights), both summed over dp. Padding comes last in global order.
    """
    starts = validation_starts(num_tokens, seq_len, limit)
    yield from in_batches(starts, np.ones(len(starts), np.float32), batch, dp, dp_rank)


def in_batches(
    starts: np.ndarray, weights: np.ndarray, batch: int, dp: int, dp_rank: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `validation_batches`, of windows with these weights."""
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    assert 0 <= dp_rank < dp
    padding = -len(starts) % (batch * dp)
    weights = np.pad(weights.astype(np.float32), (0, padding))
    starts = np.pad(starts, (0, padding), constant_values=starts[0])
    shape = (-1, dp, batch)
    yield from zip(starts.reshape(shape)[:, dp_rank], weights.reshape(shape)[:, dp_rank], strict=True)


def _check_window(num_tokens: int, seq_len: int) -> None:
    if seq_len < 1 or num_tokens < seq_len + 1:
        raise ValueError(
            f"a window of seq_len={seq_len} takes seq_len + 1 tokens and at least 2, but there are {num_tokens}: "
            "change train.seq_len or use a larger corpus"
        )
