"""Blends: shares to 1% at any length, no window of two corpora, an order that any step can be asked for alone."""

import numpy as np
import pytest

from moe_dist.config import Config, validate
from moe_dist.config.schema import DataConfig
from moe_dist.data.blending import PERIOD, BlendSampler, blended_validation, pattern, whole_shares
from moe_dist.data.sampler import SequenceSampler

SEQ = 8


def corpora_of(starts: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Which corpus each window lies in; it must lie in one."""
    ends = np.cumsum(lengths)
    first, last = (np.searchsorted(ends, starts + offset, side="right") for offset in (0, SEQ))
    assert np.array_equal(first, last)
    return first


def test_the_pattern_by_hand() -> None:
    which, before, places = pattern([3, 2, 1], period=6)
    assert which.tolist() == [0, 1, 0, 2, 1, 0]
    assert before.tolist() == [0, 0, 1, 0, 1, 2]
    assert places.tolist() == [3, 2, 1]
    assert whole_shares(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    with pytest.raises(ValueError, match="a weight of 1 among 1000001"):
        pattern([1000000, 1], period=1000)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [5, 3, 1.5, 0.5], [1, 1e-4], [0.2] * 5])
def test_shares_are_kept_at_every_length_as_well_as_by_megatron(weights: list[float]) -> None:
    """Megatron-core's own rule, of the largest shortfall, is the reference for how far a share may be off."""
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    size, share = 20_000, np.array(weights) / np.sum(weights)
    theirs, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(theirs, numbers, share, len(weights), size, False)
    ours, before, places = pattern(weights)
    assert len(ours) == PERIOD and np.abs(places / PERIOD / share - 1).max() < 0.01
    due = share[:, None] * np.arange(1, size + 1)
    counts = {
        name: np.cumsum(which[:size] == np.arange(len(weights))[:, None], axis=1)
        for name, which in (("ours", ours), ("theirs", theirs))
    }
    off = {name: np.abs(count - due).max() for name, count in counts.items()}
    assert off["ours"] <= max(off["theirs"], 1.0) + 1e-6
    for corpus in range(len(weights)):  # the jth of a corpus is its jth
        here = before[ours == corpus]
        assert np.array_equal(here, np.arange(places[corpus]))


def test_sequences_of_a_run_keep_the_shares_and_any_step_is_found_alone() -> None:
    lengths, weights = [4001, 900, 120], [0.6, 0.3, 0.1]
    sampler = BlendSampler(lengths, weights, SEQ, 10, seed=3)
    steps = np.stack([sampler.indices(step) for step in range(300)])
    which = corpora_of(steps.ravel(), lengths)
    assert np.abs(np.bincount(which) / which.size / weights - 1).max() < 0.01
    alone = BlendSampler(lengths, weights, SEQ, 10, seed=3)
    for step in (299, 5, 123, 0):
        assert np.array_equal(alone.indices(step), steps[step])
    assert not np.array_equal(BlendSampler(lengths, weights, SEQ, 10, seed=4).indices(0), steps[0])
    halves = BlendSampler(lengths, weights, SEQ, 5, seed=3)  # other batches, the same sequences in the same order
    assert np.array_equal(np.concatenate([halves.indices(step) for step in range(20)]), steps[:10].ravel())
    first = steps.ravel()[which == 0]  # each window of an epoch once, before any comes again
    size = sampler.samplers[0].windows_per_epoch
    assert len(set(first[:size].tolist())) == size


def test_the_order_goes_on_over_the_end_of_a_period() -> None:
    sampler, global_batch = BlendSampler([4001, 900], [2, 1], SEQ, 64, seed=0), 64
    step = PERIOD // global_batch
    which = corpora_of(np.concatenate([sampler.indices(step - 1), sampler.indices(step)]), [4001, 900])
    assert np.array_equal(which[:64], pattern([2, 1])[0][-64:]) and np.array_equal(which[64:], pattern([2, 1])[0][:64])
    there = int(pattern([2, 1])[2][0])  # of the first corpus, so many have been seen
    alone = SequenceSampler(4001, SEQ, 1, 0, (0, 0))
    assert sampler.indices(step)[which[64:] == 0][0] == alone.starts(np.array([there]))[0]


def test_validation_weighs_each_corpus_by_its_share() -> None:
    lengths, weights = [1000, 400, 30], [2.0, 1.0, 1.0]
    starts, of_windows = blended_validation(lengths, weights, SEQ, 16)
    which = corpora_of(starts, lengths)
    assert np.bincount(which).tolist() == [8, 4, 3]  # the last has only three windows, which weigh more
    assert np.allclose(np.bincount(which, of_windows), [0.5, 0.25, 0.25])
    assert len(set(starts.tolist())) == len(starts)


def refused(**data: object) -> str:
    with pytest.raises(ValueError) as caught:
        validate(Config(data=DataConfig(kind="indexed", **data)), 1)  # type: ignore[arg-type]
    return str(caught.value)


def test_rules() -> None:
    validate(Config(data=DataConfig(kind="indexed", blend={"a": 1.0, "b": 2.0}, validation_paths=["c"])), 1)
    assert "clear one of them" in refused(blend={"a": 1.0}, paths=["b"])
    assert "blend[a]=0.0 is outside 0 < weight" in refused(blend={"a": 0.0, "b": 1.0})
    assert "is a share of 1e-05, below 0.0001" in refused(blend={"a": 1e-5, "b": 1.0})
    assert "validation_paths names a, which is trained on" in refused(blend={"a": 1.0}, validation_paths=["a"])
    for same in ("./a", "b/../a.idx", "a.bin"):  # what is trained on, in other words
        assert f"validation_paths names {same}, which is trained on" in refused(
            blend={"a": 1.0}, validation_paths=[same]
        )
    assert "means nothing where data.validation_paths" in refused(
        paths=["a"], validation_paths=["b"], validation_fraction=0.5
    )
    with pytest.raises(ValueError, match=r"blend=.* is of kind=indexed"):
        validate(Config(data=DataConfig(kind="stdlib", blend={"a": 1.0})), 1)
