"""How frequent tokens are: counts beside a loop, classes beside the rule read aloud."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.frequency import Frequencies, token_counts
from moe_dist.data.stream import TokenStream
from moe_dist.moe.drops import FREQUENCIES


def classes_by_hand(counts: list[int]) -> list[int]:
    """From the most frequent id down, the highest class that still wants tokens takes the next one."""
    order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    left, number, taken, wanted = sum(counts), FREQUENCIES - 1, 0, 0.0
    wanted, classes = left / FREQUENCIES, [0] * len(counts)
    for token in order:
        if counts[token] == 0:
            continue
        classes[token] = number
        taken += counts[token]
        if taken >= wanted and number > 0:
            left, number, taken = left - taken, number - 1, 0
            wanted = left / (number + 1)
    return classes


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60).filter(any))
def test_classes_are_those_of_the_rule(counts: list[int]) -> None:
    found = Frequencies.of(np.array(counts))
    assert found.classes_V.tolist() == classes_by_hand(counts)
    record = found.record()
    assert record["counted"] == sum(record["tokens"]) == sum(counts) and sum(record["ids"]) == len(counts)
    for number in range(FREQUENCIES):
        assert record["tokens"][number] == sum(c for c, of in zip(counts, found.classes_V, strict=True) if of == number)


def test_classes_by_hand() -> None:
    assert Frequencies.of(np.array([1] * 16)).classes_V.tolist() == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert Frequencies.of(np.array([0, 100, 7, 7, 7, 7, 7, 7, 7])).classes_V.tolist() == [0, 7, 6, 5, 4, 3, 2, 1, 0]
    zipf = Frequencies.of((1e6 / np.arange(1, 50_001)).astype(np.int64)).record()
    assert max(zipf["tokens"]) < 1.1 * min(zipf["tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_small_split_is_counted_as_a_whole(stream: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, 9, 40_000).astype(np.uint8)
    split = TokenStream([tokens[:7], tokens[7:]]) if stream else tokens
    counted = Counter(tokens.tolist())
    assert token_counts(split, 12).tolist() == [counted[token] for token in range(12)]


def test_of_a_large_split_windows_over_all_of_it_are_counted() -> None:
    """Token v makes up the v-th of ten equal parts: each is counted, and no token twice."""
    tokens = np.arange(10).repeat(1 << 18)
    counts = token_counts(tokens, 10, sample=1 << 19)
    assert counts.sum() == 1 << 19 and counts.min() > 0.8 * (1 << 19) / 10
    assert counts.tolist() == token_counts(TokenStream([tokens]), 10, sample=1 << 19).tolist()
    unlike = np.arange(1 << 20)
    assert token_counts(unlike, 1 << 20, sample=1 << 16).max() == 1
