"""Corpora that a tokenizer makes of texts when a run starts, and the tokenizer of indexed ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_dist.config import Config, validate
from moe_dist.config.schema import DataConfig
from moe_dist.data.corpus import load_corpus
from moe_dist.data.prepare.job import prepare
from moe_dist.data.prepare.steps import Request
from moe_dist.data.tokenizers import load_tokenizer
from tests.unit.data.test_prepare import Quiet, jsonl
from tests.unit.data.test_tokenizers import byte_level

WORDS = ["the cat sat", "on the mat", "naïve café", "日本語", "two\nlines\n"]


def texts(number: int) -> list[str]:
    return [f"{WORDS[n % 5]} {n}" for n in range(number)]


def test_each_document_is_tokenised_and_ended(tmp_path: Path) -> None:
    tok = str(byte_level(tmp_path / "tok"))
    config = DataConfig(kind="jsonl", paths=[str(jsonl(tmp_path / "a.jsonl", texts(40)))], tokenizer=tok)
    corpus, tokenizer = load_corpus(config, 300, 4), load_tokenizer(tok)
    assert (corpus.unit, corpus.made_of) == ("token", "records") and corpus.tokenizer is not None
    assert corpus.tokenizer.digest == tokenizer.digest
    found = []
    for split in (corpus.train, corpus.validation):
        ids = np.asarray(split).tolist()
        assert ids[-1] == tokenizer.end_id
        found += tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(texts(40))
    ends = np.flatnonzero(np.asarray(corpus.train) == tokenizer.end_id)
    assert corpus.document_of(ends).tolist() == list(range(len(ends)))
    assert corpus.document_of(ends[:-1] + 1).tolist() == list(range(1, len(ends)))
    as_bytes = load_corpus(DataConfig(kind="jsonl", paths=config.paths), 256, 4)
    assert as_bytes.digest != corpus.digest and as_bytes.unit == "byte"
    splits = [len(bytes(np.asarray(part).tolist()).split(b"\0")) - 1 for part in (as_bytes.train, as_bytes.validation)]
    assert splits == [len(ends), 40 - len(ends)]  # the same documents are held out
    with pytest.raises(ValueError, match=r"tok has 300 token ids, but model.vocab_size is 299: set model.vocab_size"):
        load_corpus(config, 299, 4)


def test_a_single_text_is_cut_between_two_characters(tmp_path: Path) -> None:
    tok, text = str(byte_level(tmp_path / "tok")), "日本語" * 30
    (tmp_path / "a.txt").write_text(text)
    for fraction in (0.1, 0.11, 0.12, 0.5):
        config = DataConfig(kind="text", paths=[str(tmp_path / "a.txt")], tokenizer=tok, validation_fraction=fraction)
        corpus, tokenizer = load_corpus(config, 300, 4), load_tokenizer(tok)
        train, validation = (tokenizer.decode(np.asarray(part).tolist()) for part in (corpus.train, corpus.validation))
        assert train + validation == text and "\ufffd" not in train + validation


def test_what_is_not_utf8_is_left_out_and_said(tmp_path: Path) -> None:
    tok = str(byte_level(tmp_path / "tok"))
    (tmp_path / "in").mkdir()
    for n, text in enumerate(texts(30)):
        (tmp_path / f"in/{n}").write_text(text)
    (tmp_path / "in/odd").write_bytes(b"caf\xe9")
    config = DataConfig(kind="text", paths=[str(tmp_path / "in")], tokenizer=tok, validation_fraction=0.3)
    corpus = load_corpus(config, 300, 4)
    assert list(corpus.left_out.names) == ["not UTF-8"] and corpus.num_files == 30
    for path in (tmp_path / "in").glob("[0-9]*"):
        path.unlink()
    with pytest.raises(ValueError, match="none of 1 texts is UTF-8"):
        load_corpus(config, 300, 4)


def prepared(prefix: Path, tokenizer: str) -> str:
    source = jsonl(prefix.with_suffix(".jsonl"), texts(20))
    prepare(Request([str(source)], prefix, tokenizer), Quiet())
    return str(prefix)


def test_an_indexed_corpus_brings_its_tokenizer(tmp_path: Path) -> None:
    tok, other = str(byte_level(tmp_path / "tok")), str(byte_level(tmp_path / "other", vocab_size=280))
    a, b, c = prepared(tmp_path / "a", tok), prepared(tmp_path / "b", tok), prepared(tmp_path / "c", other)
    d = prepared(tmp_path / "d", "bytes")

    def found(*paths: str, tokenizer: str | None = None) -> str | None:
        config = DataConfig(kind="indexed", paths=list(paths), tokenizer=tokenizer, validation_fraction=0.4)
        known = load_corpus(config, 300, 4).tokenizer
        return None if known is None else known.digest

    digest = load_tokenizer(tok).digest
    assert found(a) == found(f"{a}.bin", b) == found(a, tokenizer=tok) == digest
    assert found(d) == load_tokenizer("bytes").digest
    with pytest.raises(ValueError, match=rf"{c} was made with another tokenizer than {a}"):
        found(a, c)
    with pytest.raises(ValueError, match=rf"{a} was made with another tokenizer than data.tokenizer={other}"):
        found(a, tokenizer=other)
    for name in ("a.json", "a.tokenizer/tokenizer.json", "a.tokenizer/tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "a.tokenizer").rmdir()
    assert found(a) is None and found(a, b) is None and found(a, tokenizer=tok) == digest
    record = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(record | {"tokenizer": record["tokenizer"] | {"digest": "0"}}))
    with pytest.raises(ValueError, match=r"b.tokenizer is not the tokenizer that .*b.bin was made with"):
        found(b)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b.json is not what `moe-dist data prepare` writes"):
        found(b)


def test_zstd_is_text_too(tmp_path: Path) -> None:
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    (tmp_path / "a").write_bytes(codec.compress(b"abcdef", asbytes=True))
    corpus = load_corpus(DataConfig(kind="text", paths=[str(tmp_path / "a")], validation_fraction=0.5), 256, 2)
    assert np.asarray(corpus.train).tobytes() + np.asarray(corpus.validation).tobytes() == b"abcdef"
    (tmp_path / "a").write_bytes(codec.compress(b"abcdef", asbytes=True)[:-3])
    with pytest.raises(ValueError, match=r"cannot be read: .*[Tt]runcated"):
        load_corpus(DataConfig(kind="text", paths=[str(tmp_path / "a")], validation_fraction=0.5), 256, 2)


def test_rules() -> None:
    config = Config(data=DataConfig(tokenizer="tok", end_of_text="</s>"))
    config.model.vocab_size = 128  # no bytes, so less than 256 is fine
    validate(config, 1)
    config.data.tokenizer = None
    with pytest.raises(ValueError, match=r"(?s)end_of_text=</s> needs data.tokenizer.*vocab_size=128 is below 256"):
        validate(config, 1)
    config = Config(task="classification", data=DataConfig(tokenizer="tok", mask_documents=True))
    with pytest.raises(
        ValueError, match=r"(?s)mask_documents=true is of language models.*tokenizer=tok is of language"
    ):
        validate(config, 1)
