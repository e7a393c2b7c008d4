"""Several corpora in one run, each with its share of the sequences: which corpus a sequence is of, and which of its.

A blend is a pattern of PERIOD sequences that is repeated. Corpus c, of share w_c, has as many of them as its share
says, to one, and its kth stands where it is due,

    t = (k + 1/2) / w_c          shares 1/2, 1/3, 1/6:   a b a c b a  a b a c b a ...

so that after any number of sequences each corpus is at most about one from its share (the order of Webster's method, by
which seats are shared out). Sequence n of a run is in turn n // PERIOD of the pattern, and so the jth of its corpus,
where j = turn * places of the corpus in a turn + those before it in this one. Which window of the corpus the jth is,
sampler.py says. So the order is a function of seed and step alone, whatever the length of the run.

Megatron-core's BlendedDataset has the same meaning, and another order: its GPTDataset shuffles the documents of all the
epochs that a run will need together, so another train.steps is another order of what was read before; and it keeps an
entry for each sequence of the run, in files that rank 0 writes for the others.

Legend: C corpora, N sequences.
"""

from collections.abc import Sequence

import numpy as np

from moe_dist.data.sampler import SequenceSampler, validation_starts

PERIOD = 1 << 20


class BlendSampler:
    """As SequenceSampler, over corpora that follow one another in one stream of tokens. No window has tokens of two."""

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float], seq_len: int, global_batch: int, seed: int
    ) -> None:
        """lengths: tokens of each corpus. weights: above 0, in any unit."""
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch} must be at least 1")
        self.global_batch = global_batch
        self.samplers = [
            SequenceSampler(length, seq_len, global_batch, seed, (number, 0)) for number, length in enumerate(lengths)
        ]
        self._begins = np.cumsum([0, *lengths[:-1]])
        self._which, self._before, self._in_turn = pattern(weights)

    def indices(self, step: int) -> np.ndarray:
        """Start offsets [global_batch] int64 in the stream, of the sequences of optimizer step `step`, from 0."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative: the first step is 0")
        turn_N, place_N = np.divmod(np.arange(step * self.global_batch, (step + 1) * self.global_batch), PERIOD)
        which_N = self._which[place_N]
        number_N = turn_N * self._in_turn[which_N] + self._before[place_N]
        starts_N = np.empty(self.global_batch, np.int64)
        for corpus, sampler in enumerate(self.samplers):
            here = which_N == corpus
            starts_N[here] = self._begins[corpus] + sampler.starts(number_N[here])
        return starts_N


def pattern(weights: Sequence[float], period: int = PERIOD) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(corpus of each place, how many places of that corpus are before it, places of each corpus); all int64.

    Raises ValueError for a corpus whose share is no whole place.
    """
    share_C = np.array(weights, np.float64) / np.sum(weights)
    places_C = whole_shares(share_C, period)
    if not places_C.all():
        raise ValueError(f"a weight of {min(weights)} among {sum(weights)} has no place in {period}: raise it")
    order_N = np.concatenate([np.arange(n, dtype=np.int64) for n in places_C])
    corpus_N = np.repeat(np.arange(len(share_C)), places_C)
    due_N = np.argsort((order_N + 0.5) / places_C[corpus_N], kind="stable")  # of equal ones, the first corpus
    return corpus_N[due_N], order_N[due_N], places_C


def whole_shares(share_C: np.ndarray, total: int) -> np.ndarray:
    """int64 that add up to total, each less than one from its share of it; the largest remainders are rounded up."""
    exact_C = share_C * total
    whole_C = np.floor(exact_C).astype(np.int64)
    up = np.argsort(whole_C - exact_C, kind="stable")[: total - int(whole_C.sum())]
    whole_C[up] += 1
    return whole_C


def blended_validation(
    lengths: Sequence[int], weights: Sequence[float], seq_len: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """(start offsets, weights) of about `limit` windows of the validation stream, evenly spread over each corpus; the
    same at every call. The weights of a corpus' windows add up to its share, also where it has few or short ones."""
    share_C = np.array(weights, np.float64) / np.sum(weights)
    starts, of_windows, begin = [], [], 0
    for length, share, count in zip(lengths, share_C, np.maximum(1, whole_shares(share_C, limit)), strict=True):
        here = validation_starts(length, seq_len, int(count))
        starts.append(begin + here)
        of_windows.append(np.full(len(here), share / len(here)))
        begin += length
    return np.concatenate(starts), np.concatenate(of_windows)
