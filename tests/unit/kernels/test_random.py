"""Random numbers that are a function of key and index alone."""

import torch

from moe_dist.kernels.random import RandomKey


def split_mix(key: int, index: int) -> float:
    """The documented hash in Python's own integers: two rounds of SplitMix64's finaliser."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    return (mix(mix((index ^ key) & mask) + 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53


def test_frozen_values() -> None:
    """Changing these changes every run that drops at random: old checkpoints would continue otherwise."""
    key = RandomKey.of(1, "a")
    assert key.value == 8415240736594023236
    assert key.uniform(torch.arange(3)).tolist() == [0.4687957846948202, 0.36427585577732824, 0.29149010011258514]


def test_uniform_is_the_documented_hash() -> None:
    for value in (0, 1, 12345, (1 << 63) - 1):
        index = torch.tensor([0, 1, 2, 1000, 2**31, 2**62 + 7])
        expected = [split_mix(value, i) for i in index.tolist()]
        assert RandomKey(value).uniform(index).tolist() == expected


def test_chunks_draw_the_same_numbers() -> None:
    key, index = RandomKey.of("chunks"), torch.arange(1000)
    whole = key.uniform(index)
    for part in (slice(0, 1), slice(17, 500), slice(999, 1000)):
        assert torch.equal(whole[part], key.uniform(index[part]))
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[shuffled], key.uniform(shuffled))


def test_uniform_fills_the_unit_interval_evenly() -> None:
    draws = RandomKey.of("even").uniform(torch.arange(100_000))
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.unique().numel() == 100_000
    # 10,000 expected in each of 10 bins with a standard deviation of 95
    assert (draws.mul(10).long().bincount(minlength=10) - 10_000).abs().max() < 500
    # neighbours are independent: correlation within 5 / sqrt(n)
    assert abs(torch.corrcoef(torch.stack((draws[:-1], draws[1:])))[0, 1]) < 0.016


def test_keys_are_independent() -> None:
    key, index = RandomKey.of(0), torch.arange(10_000)
    draws = torch.stack(
        [k.uniform(index) for k in (key, key.fold(0), key.fold(1), key.fold("drop", 0), RandomKey.of(1))]
    )
    correlation = torch.corrcoef(draws) - torch.eye(5)
    assert correlation.abs().max() < 0.05


def test_keys_depend_on_every_part_and_its_type() -> None:
    keys = [RandomKey.of(*parts) for parts in ((1,), ("1",), (1, 2), (12,), (2, 1), (1, "2"), ())]
    assert len({key.value for key in keys}) == len(keys)
    assert all(0 <= key.value < 2**63 for key in keys)
    assert RandomKey.of(1, 2) == RandomKey.of(1, 2)
    assert RandomKey.of(1).fold(2) == RandomKey.of(1).fold(2) != RandomKey.of(2).fold(1)
