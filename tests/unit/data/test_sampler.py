"""Every window once, in an order that depends on seed and step only."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.sampler import SequenceSampler, micro_batch, rank_starts, validation_batches, validation_starts


@given(seq_len=st.integers(1, 12), extra=st.integers(1, 150), batch=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_every_window_exactly_once_per_epoch(seq_len: int, extra: int, batch: int, seed: int) -> None:
    num_tokens = seq_len + extra
    sampler = SequenceSampler(num_tokens, seq_len, batch, seed)
    epochs, per_epoch = 3, sampler.windows_per_epoch
    assert per_epoch >= max(1, (num_tokens - 1) // seq_len - 1)
    visits = np.concatenate([sampler.indices(step) for step in range(-(-epochs * per_epoch // batch))])
    for epoch in range(epochs):
        starts = np.sort(visits[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(starts) == per_epoch
        assert (np.diff(starts) == seq_len).all()
        assert 0 <= starts[0] < seq_len and starts[-1] + seq_len + 1 <= num_tokens


def test_windows_counted_by_hand() -> None:
    sampler = SequenceSampler(num_tokens=10, seq_len=3, global_batch=2, seed=0)
    assert sampler.windows_per_epoch == 2  # phase 2: tokens 2..5 and 5..8
    assert sampler.num_phases == 3
    seen = {tuple(sorted(sampler.indices(step).tolist())) for step in range(50)}
    assert seen == {(0, 3), (1, 4), (2, 5)}


def test_a_step_needs_no_history() -> None:
    def fresh() -> SequenceSampler:
        return SequenceSampler(1000, 7, 11, seed=3)

    walked = fresh()
    forward = [walked.indices(step).tolist() for step in range(60)]
    assert [fresh().indices(step).tolist() for step in range(60)] == forward
    assert [walked.indices(step).tolist() for step in reversed(range(60))] == forward[::-1]


def test_the_order_is_this_one() -> None:
    """Frozen: a change here changes the loss curve of every run that is resumed."""
    sampler = SequenceSampler(num_tokens=81, seq_len=10, global_batch=8, seed=1234)
    assert [sampler.indices(step).tolist() for step in range(2)] == [
        [12, 62, 52, 2, 32, 22, 42, 41],
        [11, 21, 31, 61, 1, 51, 68, 38],
    ]


FAR = {
    0: [150879965130, 966414282, 14468026314, 27694477258, 219980582858, 283581882314, 276644904906, 165168025546],
    1: [203919081418, 177591001034, 242381074378, 23299633098, 297066516426, 173103218634, 175813992394, 121728798666],
    9155273: [
        *(181944946634, 88901001162),
        *(147166654543, 8843079759, 283928174671, 179653050447, 286686703695, 31367102543),
    ],
}


def test_a_long_order_is_computed_where_it_is_asked_for() -> None:
    """3e11 tokens: no list of 73 million windows. Frozen like the one above."""
    tracemalloc.start()
    sampler = SequenceSampler(num_tokens=300_000_000_000, seq_len=4096, global_batch=8, seed=1234)
    far = sampler.windows_per_epoch // 8  # this step ends in the second epoch
    steps = {step: sampler.indices(step).tolist() for step in (0, 1, far)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, f"{peak} bytes"
    assert sampler.windows_per_epoch == 73_242_186
    assert steps == FAR
    assert SequenceSampler(300_000_000_000, 4096, 8, seed=1234).indices(far).tolist() == steps[far]


@pytest.mark.parametrize("listed", [0, 10**6])
def test_both_orders_visit_each_window_once(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.data.sampler.LISTED", listed)
    sampler = SequenceSampler(num_tokens=3_001, seq_len=3, global_batch=7, seed=5)
    assert sampler.windows_per_epoch == 999
    visits = np.concatenate([sampler.indices(step) for step in range(999)]).reshape(7, 999)  # seven epochs
    phases = visits.min(axis=1)
    assert set(phases) == {0, 1, 2}
    assert (np.sort(visits, axis=1) == phases[:, None] + 3 * np.arange(999)).all()
    assert len({tuple(order) for order in (visits - phases[:, None]).tolist()}) == 7


def test_seed_and_epoch_change_the_order() -> None:
    first = SequenceSampler(1010, 10, 100, seed=0)
    assert first.indices(0).tolist() != first.indices(1).tolist()
    assert first.indices(0).tolist() != SequenceSampler(1010, 10, 100, seed=1).indices(0).tolist()


def test_writing_into_a_batch_does_not_change_the_next() -> None:
    sampler = SequenceSampler(100, 4, 3, seed=0)
    expected = sampler.indices(0).tolist()
    sampler.indices(0)[:] = -1
    assert sampler.indices(0).tolist() == expected


def test_rank_starts_by_hand() -> None:
    starts = np.arange(8)
    parts = [[rank_starts(starts, 2, 2, rank, a).tolist() for rank in range(2)] for a in range(2)]
    assert parts == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    with pytest.raises(ValueError, match=r"global_batch=8 must be a multiple of .* = 3 \* 1"):
        rank_starts(starts, 3, 1, 0, 0)


@given(accumulation=st.integers(1, 4), micro=st.integers(1, 3), step=st.integers(0, 50))
def test_micro_step_is_the_same_for_every_dp(accumulation: int, micro: int, step: int) -> None:
    starts = SequenceSampler(3000, 5, accumulation * 4 * micro, seed=1).indices(step)

    def micro_step(a: int, dp: int) -> list[int]:
        return np.concatenate([rank_starts(starts, accumulation, dp, rank, a) for rank in range(dp)]).tolist()

    for a in range(accumulation):
        assert micro_step(a, 1) == micro_step(a, 2) == micro_step(a, 4)


def test_micro_batch_shifts_targets_by_one() -> None:
    split = np.arange(250, 256, dtype=np.uint8)
    tokens_BS, targets_BS = micro_batch(split, np.array([0, 2]), seq_len=3)
    assert tokens_BS.tolist() == [[250, 251, 252], [252, 253, 254]]
    assert targets_BS.tolist() == [[251, 252, 253], [253, 254, 255]]
    assert tokens_BS.dtype == targets_BS.dtype == torch.int64
    assert tokens_BS.is_contiguous() and targets_BS.is_contiguous()


def test_validation_starts_are_spread_evenly() -> None:
    assert validation_starts(num_tokens=101, seq_len=10, limit=4).tolist() == [0, 20, 50, 70]
    assert validation_starts(num_tokens=100, seq_len=10, limit=99).tolist() == list(range(0, 90, 10))


@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 50), st.integers(1, 5), st.sampled_from([1, 2, 3, 4]))
def test_validation_covers_each_window_once(seq_len: int, extra: int, limit: int, batch: int, dp: int) -> None:
    num_tokens = seq_len + extra
    ranks = [list(validation_batches(num_tokens, seq_len, limit, batch, dp, rank)) for rank in range(dp)]
    assert len({len(batches) for batches in ranks}) == 1
    counts: Counter[int] = Counter()
    for starts, weights in (pair for batches in ranks for pair in batches):
        assert starts.shape == weights.shape == (batch,)
        assert (starts >= 0).all() and (starts + seq_len + 1 <= num_tokens).all()
        for start, weight in zip(starts.tolist(), weights.tolist(), strict=True):
            counts[start] += weight
    expected = validation_starts(num_tokens, seq_len, limit)
    assert (np.diff(expected) >= seq_len).all()
    assert counts == dict.fromkeys(expected.tolist(), 1)


def test_validation_pads_the_last_batch() -> None:
    ranks = [list(validation_batches(51, 10, 5, batch=2, dp=2, dp_rank=rank)) for rank in range(2)]
    assert [(s.tolist(), w.tolist()) for s, w in ranks[0]] == [([0, 10], [1, 1]), ([40, 0], [1, 0])]
    assert [(s.tolist(), w.tolist()) for s, w in ranks[1]] == [([20, 30], [1, 1]), ([0, 0], [0, 0])]


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len=10 .* there are 10"):
        SequenceSampler(10, 10, 1, 0)
    with pytest.raises(ValueError, match="there are 10"):
        validation_starts(10, 10, 1)
    with pytest.raises(ValueError, match="global_batch=0"):
        SequenceSampler(11, 10, 0, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        SequenceSampler(11, 10, 1, -1)
    with pytest.raises(ValueError, match="step=-1"):
        SequenceSampler(11, 10, 1, 0).indices(-1)
    with pytest.raises(ValueError, match="limit=0"):
        validation_starts(11, 10, 0)
