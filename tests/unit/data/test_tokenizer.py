"""Bytes in, the same bytes out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.tokenizer import ByteTokenizer, bits_per_byte


def test_ids_are_the_utf8_bytes() -> None:
    assert ByteTokenizer().encode("aé\0") == [97, 0xC3, 0xA9, ByteTokenizer.separator_id]
    assert ByteTokenizer().encode(b"\xff\x00") == [255, 0]
    assert ByteTokenizer.vocab_size == 256


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_decode_marks_what_is_no_text() -> None:
    assert ByteTokenizer().decode([97, 0xC3, 98]) == "a\ufffdb"
    assert ByteTokenizer().decode([97, 300, 98]) == "a\ufffdb"
    with pytest.raises(ValueError):
        ByteTokenizer().decode([-1])


def test_prompt_that_is_not_utf8_keeps_its_bytes() -> None:
    assert ByteTokenizer().encode(b"\xe9".decode("utf-8", errors="surrogateescape")) == [0xE9]


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), tokens=10, num_bytes=10) == pytest.approx(8)
    assert bits_per_byte(math.log(2), tokens=10, num_bytes=40) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, 1, 0)
