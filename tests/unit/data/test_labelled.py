"""Labelled texts: what is read, in which split it is, and what is refused."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_dist.config.schema import DataConfig
from moe_dist.data.labelled import (
    PACKAGES,
    Example,
    LabelledCorpus,
    load_labelled,
    read_examples,
    split,
    stdlib_examples,
)
from moe_dist.data.subwords import Subwords


def write_jsonl(path: Path, rows: list[tuple[str, object]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def numbered(count: int, label: str = "even odd") -> list[tuple[str, object]]:
    names = label.split()
    return [(f"number_{i} is {names[i % 2]}", names[i % 2]) for i in range(count)]


def load(path: str, **changes: object) -> LabelledCorpus:
    return load_labelled(DataConfig(**{"kind": "jsonl", "paths": [path], **changes}), 200, 8)


def test_splits_depend_on_the_text_alone(tmp_path: Path) -> None:
    rows = numbered(300)
    one = load(write_jsonl(tmp_path / "a.jsonl", rows))
    two = load(write_jsonl(tmp_path / "b.jsonl", rows[::-1]))
    for part in ("train", "validation", "test"):
        mine, other = getattr(one, part), getattr(two, part)
        pairs = [sorted(zip(s.tokens_NS.tolist(), s.labels_N.tolist(), strict=True)) for s in (mine, other)]
        assert pairs[0] == pairs[1]
    sizes = [len(getattr(one, part).labels_N) for part in ("train", "validation", "test")]
    assert sum(sizes) == 300 and 15 <= sizes[1] <= 45 and 15 <= sizes[2] <= 45
    assert load(str(tmp_path / "a.jsonl")).digest == one.digest != two.digest


def test_copies_are_in_one_split_once(tmp_path: Path) -> None:
    rows = numbered(100)
    copies = [(text.replace(" ", "\t \n"), "odd") for text, _ in rows]
    corpus = load(write_jsonl(tmp_path / "a.jsonl", rows + copies))
    assert corpus.num_copies == 100
    assert sum(len(part.labels_N) for part in (corpus.train, corpus.validation, corpus.test)) == 100
    assert np.bincount(corpus.train.labels_N).min() > 30  # the first of two labels stays


def test_split_shares() -> None:
    parts = split([Example(str(i), "a") for i in range(20_000)], validation=0.2, test=0.05)
    assert abs(len(parts["validation"]) - 4000) < 250 and abs(len(parts["test"]) - 1000) < 130


def test_tokens_are_padded_and_cut(tmp_path: Path) -> None:
    rows = [*numbered(200), ("a b c d e f g h i j", "odd"), ("x", "even")]
    corpus = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert corpus.labels == ("even", "odd") and corpus.num_truncated == 1
    for part in (corpus.train, corpus.validation, corpus.test):
        assert part.tokens_NS.shape == (len(part.labels_N), 8) and part.tokens_NS.dtype == np.int64
        real_NS = part.tokens_NS != 0
        assert real_NS[:, 0].all() and (real_NS[:, :-1] >= real_NS[:, 1:]).all()  # padding comes last


def test_subwords_by_hand() -> None:
    subwords = Subwords.learn(["ab ab ab ab_12", "ab"], vocab_size=8)
    ids, truncated = subwords.encode(["ab", "ab  ab\nab", "a?"], 3)
    assert subwords.vocab_size == 8  # padding, unknown, 1, 2, _, a, b, ab
    assert truncated == 0 and ids[0].tolist() == [7, 0, 0] and ids[1].tolist() == [7, 7, 7]
    assert ids[2].tolist() == [5, 1, 0]
    assert subwords.encode(["ab_12ab"], 5)[0].tolist() == [[7, 4, 2, 3, 7]]


def test_subwords_survive_their_file(tmp_path: Path) -> None:
    subwords = Subwords.learn([text for text, _ in numbered(50)], 60)
    (tmp_path / "tokenizer.json").write_text(subwords.dumps())
    again = Subwords.load(tmp_path / "tokenizer.json")
    assert (again.encode(["number_7 is odd"], 9)[0] == subwords.encode(["number_7 is odd"], 9)[0]).all()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Subwords.load(tmp_path / "tokenizer.json")


def test_csv_and_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f'"line {i}, and\nmore",{i % 3}\n' for i in range(60))
    path.write_text("words,kind\n" + rows, newline="")
    corpus = load(str(path), kind="csv", text_key="words", label_key="kind")
    assert corpus.labels == ("0", "1", "2")
    assert sum(len(part.labels_N) for part in (corpus.train, corpus.validation, corpus.test)) == 60


def test_true_and_false_are_labels_and_no_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n{"text": true}\n')
    examples = read_examples(DataConfig(kind="jsonl", paths=[str(tmp_path / "a.jsonl")]))
    assert [next(examples).label, next(examples).label] == ["true", "false"]
    with pytest.raises(ValueError, match=r"line 3: true at 'text' is no text: set data\.text_key"):
        next(examples)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, encoding: str) -> None:
    """A byte-order mark, a blank after the comma, a text longer than the csv module reads by itself."""
    path, before = tmp_path / "a.csv", csv.field_size_limit()
    rows = [f'"{i} d\u00e9j\u00e0, ""vu"" {"x " * 70_000 if i == 7 else ""}", {"ab"[i % 2]} \r\n' for i in range(60)]
    path.write_bytes(("text, label\r\n\r\n" + "".join(rows)).encode(encoding))
    examples = list(read_examples(DataConfig(kind="csv", paths=[str(path)])))
    assert [example.text[:14] for example in examples[:2]] == ['0 d\u00e9j\u00e0, "vu" ', '1 d\u00e9j\u00e0, "vu" ']
    assert len(examples[7].text) > 131_072 and csv.field_size_limit() == before
    assert load(str(path), kind="csv").labels == ("a", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\na,1\nwell, then,1\n", "line 3: 3 fields, but the header names 2: put a text that holds a comma"),
        ("text,label\na,1\nb\n", "line 3: 1 fields, but the header names 2"),
        ('text,label\n"a\nb",1\n"",1\n', "line 4: 'text' is empty: fill it, or take the line out"),
        ("text,label\na,1\nb,  \n", "line 3: 'label' is empty"),
        ('text,label\na,1\n"b" c,1\n', "line 3: no CSV: ',' expected after '\"'; put a text with quotes"),
        ('text,label\na,1\n"b,1\nc,1\n', "line 3: no CSV: unexpected end of data"),
        ("text,label,text\na,1,b\n", "line 1: the header names text twice"),
        ("text,kind\na,1\n", "line 2: no text or whole number at 'label', but text, kind: set data.label_key"),
        ("text,label\n\0", "a.csv in data.paths is binary: give text"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        load(str(tmp_path / "a.csv"), kind="csv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a\\ud800", "label": 1}\n', "line 1: the text at 'text' holds half of a surrogate pair"),
        ('{"text": "a"}\n', "line 1: no text or whole number at 'label', but text: set data.label_key"),
        ('{"text": "a", "label": 1}\n{"text"\n', "line 2: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"text": "a", "label": 1}\n', "has 1 labels .*at least two"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n', "none of 2 texts fell into the .* split"),
        (
            '{"text": " ", "label": 1}\n' + "".join(f'{{"text": "b{i}", "label": {i}}}\n' for i in range(99)),
            "line 1: 'text' is empty: fill",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "a.jsonl"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl in data\.paths cannot be read"):
        load(str(tmp_path / "none.jsonl"))


def test_stdlib_blocks_by_hand(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package / "test").mkdir(parents=True)
        (tmp_path / package / "test" / "a.py").write_text("left = out\n" * 9)
        (tmp_path / package / "a.py").write_text("".join(f"{package}_{i} = 1\n\n   \n" for i in range(5)))
    found = list(stdlib_examples(2, tmp_path))
    assert [example.text for example in found[:2]] == ["asyncio_0 = 1\nasyncio_1 = 1", "asyncio_2 = 1\nasyncio_3 = 1"]
    assert [example.label for example in found] == [package for package in PACKAGES for _ in range(2)]


def test_the_default_data() -> None:
    """As every machine has it: eight classes, none rare, nothing of the test split in another."""
    corpus = load_labelled(DataConfig(), 2000, 80)
    assert corpus.labels == PACKAGES
    counts = np.bincount(corpus.train.labels_N)
    assert len(counts) == 8 and counts.min() > 0.05 * counts.sum() and counts.sum() > 7000
    rows = [{row.tobytes() for row in part.tokens_NS} for part in (corpus.train, corpus.validation, corpus.test)]
    assert len(rows[2] & rows[0]) + len(rows[1] & rows[0]) < 0.01 * len(rows[2])
