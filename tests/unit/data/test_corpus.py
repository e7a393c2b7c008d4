"""What is read, in which order, how it is split, and how it is refused."""

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_dist.config import Config, validate
from moe_dist.config.schema import DataConfig
from moe_dist.data.corpus import Corpus, load_corpus


def load(*paths: Path, fraction: float = 0.1, vocab_size: int = 256, seq_len: int = 1) -> Corpus:
    config = DataConfig(kind="text", paths=[str(p) for p in paths], validation_fraction=fraction)
    return load_corpus(config, vocab_size, seq_len)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def bucket(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10_000


def test_one_file_is_cut_near_its_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"0123456789abcdefghi"})
    corpus = load(tmp_path / "a.txt")
    assert corpus.train.tobytes() == b"0123456789abcdefg"  # int(0.9 * 19) = 17
    assert corpus.validation.tobytes() == b"hi"
    assert corpus.train.dtype == np.uint8 and corpus.num_files == 1


def test_tinyshakespeare_is_cut_where_everyone_cuts_it(tmp_path: Path) -> None:
    write(tmp_path, {"input.txt": b"x" * 1_115_394})
    corpus = load(tmp_path / "input.txt")
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)


def test_digest_covers_both_splits_and_their_lengths(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"abcdefghij"})
    expected = hashlib.sha256(bytes(7) + b"\x05abcde" + bytes(7) + b"\x05fghij").hexdigest()
    assert load(tmp_path / "a.txt", fraction=0.5).digest == expected
    assert load(tmp_path / "a.txt", fraction=0.4).digest != expected


def test_files_are_split_by_a_hash_of_their_path(tmp_path: Path) -> None:
    names = ["b", "a/z", "a-b", "c", "d", "e"]
    write(tmp_path, {name: name.encode() * 3 for name in names})
    cut = sorted(bucket(name) for name in names)[2]
    corpus = load(tmp_path, fraction=cut / 10_000)

    def join(chosen: list[str]) -> bytes:
        return b"".join(name.encode() * 3 + b"\0" for name in sorted(chosen))

    assert corpus.validation.tobytes() == join([n for n in names if bucket(n) < cut])
    assert corpus.train.tobytes() == join([n for n in names if bucket(n) >= cut])
    assert corpus.num_files == 6


def test_which_document_a_token_is_of(tmp_path: Path) -> None:
    """A separator is of the document before it."""
    write(tmp_path, {f"{i}": bytes([65 + i]) * (i + 1) for i in range(12)})
    train = load(tmp_path, fraction=0.4).train
    numbers, number = [], 0
    for byte in train.tolist():
        numbers.append(number)
        number += byte == 0
    assert load(tmp_path, fraction=0.4).document_of(np.arange(len(train))).tolist() == numbers and number > 3
    write(tmp_path, {"one": b"abcdefgh" * 9})
    assert load(tmp_path / "one").document_of(np.arange(7)).tolist() == [0] * 7


def test_the_order_of_the_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"{i % 3}/{i}": f"text {i}".encode() for i in range(12)})
    digest = load(tmp_path, fraction=0.5).digest
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    assert load(tmp_path, fraction=0.5).digest == digest
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path)))
    assert load(tmp_path, fraction=0.5).digest == digest


def test_folders_skip_what_is_no_text_and_count_it(tmp_path: Path) -> None:
    files = {
        "only.txt": b"caf\xe9 is not UTF-8",
        "copy.txt": b"caf\xe9 is not UTF-8",
        "empty.txt": b"",
        "binary": b"x" * 8191 + b"\0",
        ".hidden": b"hidden",
        ".git/config": b"hidden too",
    }
    write(tmp_path, files)
    corpus = load(tmp_path, fraction=0.5)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == files["only.txt"]
    assert corpus.num_files == 1 and len(corpus.left_out) == 5
    names = {reason: sorted(Path(name).name for name in found) for reason, found in corpus.left_out.names.items()}
    assert names == {
        "hidden": [".git", ".hidden"],
        "empty": ["empty.txt"],
        "binary": ["binary"],
        "a copy": ["only.txt"],
    }
    assert corpus.left_out.describe().startswith("5 left out: 2 hidden (")


def test_a_nul_beyond_the_first_8_kib_is_text(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x" * 8192 + b"\0"})
    assert load(tmp_path).num_files == 1


def test_a_hidden_file_that_is_named_is_taken(tmp_path: Path) -> None:
    write(tmp_path, {".a": b"\1\2\3\4"})
    assert load(tmp_path / ".a", fraction=0.5).train.tolist() == [1, 2]


TEXT = "d\u00e9j\u00e0 vu \u2026 " * 40


def test_a_share_that_is_far_from_what_was_asked_is_told(tmp_path: Path) -> None:
    """Two files of very different size, of which one is held out; a single file is cut where it should be."""
    write(tmp_path, {f"{number}.txt": f"{number} ".encode() * (4000 if number == 3 else 200) for number in range(8)})
    told = load(tmp_path, fraction=0.3)
    held_out = len(told.validation) / (len(told.train) + len(told.validation))
    assert told.share_note(held_out) is None and told.share_note(held_out / 1.9) is None
    for asked in (held_out / 2.1, held_out * 2.1):
        note = told.share_note(asked)
        assert note is not None and f"validation is {held_out:.1%} of the bytes" in note
        assert f"asks for {asked:.1%}" in note and "whole files are held out" in note
    assert load(tmp_path / "3.txt", fraction=0.3).share_note(0.3) is None


PACKED = {
    "gz": gzip.compress(TEXT.encode()),
    "xz": lzma.compress(TEXT.encode()),
    "bz2": bz2.compress(TEXT.encode()),
    "utf-8-sig": TEXT.encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "both": gzip.compress(TEXT.encode("utf-16")),
}


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("named", [True, False])
def test_what_is_packed_or_marked_is_read_as_its_text(tmp_path: Path, how: str, named: bool) -> None:
    write(tmp_path, {"any": PACKED[how]})
    corpus = load(tmp_path / "any" if named else tmp_path, fraction=0.5)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == TEXT.encode()
    assert len(corpus.left_out) == 0 and corpus.validation_share == 0.5


NO_TEXT = {
    "binary": b"\x7fELF\0\1",
    "a PDF": b"%PDF-1.7 stream",
    "a zip archive": b"PK\x03\x04abc",
    "a Parquet file": b"PAR1abc",
    "a Megatron index": b"MMIDIDX\0\0",
    "not the UTF-16 that its byte-order mark says": b"\xff\xfea\0b",
    "empty": b"",
}


@pytest.mark.parametrize("reason", NO_TEXT)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_is_no_text_is_refused_by_name_or_left_out(tmp_path: Path, reason: str, pack: Callable) -> None:
    write(tmp_path, {"odd": pack(NO_TEXT[reason]), "text": b"abcdef"})
    with pytest.raises(ValueError, match=f"odd in data.paths has no text, it is {reason}: remove it"):
        load(tmp_path / "text", tmp_path / "odd")
    corpus = load(tmp_path, fraction=0.5)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"abcdef"
    assert corpus.left_out.names == {reason: [str(tmp_path / "odd")]}


@pytest.mark.parametrize("how", ["gz", "xz", "bz2"])
def test_an_archive_that_was_cut_short(tmp_path: Path, how: str) -> None:
    write(tmp_path, {"in/a": PACKED[how][:-9]})
    for path in (tmp_path / "in", tmp_path / "in/a"):
        with pytest.raises(ValueError, match=r"in data.paths cannot be read: .*ended before"):
            load(path)


def test_files_of_one_name_can_be_in_both_splits(tmp_path: Path) -> None:
    paths = [f"{folder}/{name}" for folder in "abcdefgh" for name in ("train.txt", "own.txt")][::2] + ["a/own.txt"]
    write(tmp_path, {path: path.encode() * 3 for path in paths})
    expected = {path: bucket("own.txt" if path == "a/own.txt" else path) for path in paths}
    cut = sorted(expected.values())[4]
    both = [load(*[tmp_path / path for path in paths], fraction=cut / 10_000)]
    folders = sorted({path.partition("/")[0] for path in paths})
    both.append(load(*[tmp_path / folder for folder in folders], fraction=cut / 10_000))
    for corpus in both:
        held_out = {text.decode() for text in corpus.validation.tobytes().split(b"\0") if text}
        assert held_out == {path * 3 for path in paths if expected[path] < cut}


def test_a_path_given_twice_is_a_copy(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"abcdef"})
    corpus = load(tmp_path / "a", tmp_path / "a", fraction=0.5)
    assert corpus.num_files == 1 and len(corpus.left_out) == 1


def test_a_language_model_reads_the_texts_of_records(tmp_path: Path) -> None:
    texts = [f"text {i}, \u00e9" for i in range(40)]
    rows = [json.dumps({"words": text, "other": [1]}, ensure_ascii=False) for text in [*texts, texts[0], ""]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode("utf-8-sig")))
    (tmp_path / "a.csv").write_text("words,n\n" + "".join(f'"{text}",1\n' for text in texts[::-1]), "utf-8")
    found = []
    for kind, name in (("jsonl", "a.jsonl.gz"), ("csv", "a.csv")):
        data = DataConfig(kind=kind, paths=[str(tmp_path / name)], text_key="words", validation_fraction=0.3)
        validate(Config(data=data), 1)
        corpus = load_corpus(data, 256, 1)
        parts = [sorted(part.tobytes().decode().split("\0")[:-1]) for part in (corpus.train, corpus.validation)]
        assert sorted(parts[0] + parts[1]) == sorted(texts) and len(parts[1]) > 3
        assert (corpus.num_files, corpus.made_of) == (40, "records")
        found.append((parts, corpus.left_out.names))
    assert found[0][0] == found[1][0]  # a text's split depends on the text alone
    path = tmp_path / "a.jsonl.gz"
    assert found[0][1] == {"empty": [f"{path}, line 42"], "a copy": [f"{path}, line 41"]} and not found[1][1]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, {"inside/sub/a": b"abcd", "outside/b": b"efgh"})
    (tmp_path / "inside/sub/up").symlink_to(tmp_path / "inside")
    (tmp_path / "inside/self").symlink_to("self")
    (tmp_path / "inside/link").symlink_to(tmp_path / "outside")
    cut = max(bucket("link/b"), bucket("sub/a"))
    corpus = load(tmp_path / "inside", fraction=cut / 10_000)
    assert {corpus.train.tobytes(), corpus.validation.tobytes()} == {b"abcd\0", b"efgh\0"}
    assert set(corpus.left_out.names) == {
        "a link to a folder above",
        "no regular file",
    }  # not one copy of sub/a per turn around the loop


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "data.paths, which is empty"),
        (["nowhere"], "nowhere in data.paths is neither a file nor a folder"),
        (["empty.txt"], "empty.txt in data.paths has no text, it is empty"),
        (["void"], r"void in data.paths has no text \(1 left out: 1 binary"),
    ],
)
def test_paths_without_text_are_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    write(tmp_path, {"empty.txt": b"", "void/binary": b"\0"})
    with pytest.raises(ValueError, match=message):
        load(*[tmp_path / p for p in paths])


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, {"a": b"secret"})
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(ValueError, match=r"cannot be read: .*Permission denied: .*a'"):
        load(tmp_path)


def test_an_empty_split_is_refused_not_filled(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"aaaa", "b": b"bbbb"})
    with pytest.raises(ValueError, match=r"2 files fell into the validation split .*=0.0001: raise it"):
        load(tmp_path, fraction=0.0001)
    with pytest.raises(ValueError, match=r"2 files fell into the train split .*=0.9999: lower it"):
        load(tmp_path, fraction=0.9999)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_fraction_outside_0_to_1_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        load(write(tmp_path, {"a": b"abcd"}), fraction=fraction)


def test_both_splits_hold_a_sequence(tmp_path: Path) -> None:
    write(tmp_path, {"a": bytes(range(1, 101))})
    assert len(load(tmp_path, fraction=0.5, seq_len=49).validation) == 50
    with pytest.raises(ValueError, match=r"validation has 10 tokens, but seq_len=10 needs at least 11: .*raise"):
        load(tmp_path, fraction=0.1, seq_len=10)
    with pytest.raises(ValueError, match=r"train has 25 tokens, but seq_len=25 needs at least 26: .*lower data"):
        load(tmp_path, fraction=0.75, seq_len=25)


def test_ids_fit_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"AAAA", "b": b"BBzB"})
    cut = max(bucket("a"), bucket("b")) / 10_000
    assert load(tmp_path, fraction=cut, vocab_size=123).vocab_size == 123
    with pytest.raises(ValueError, match=r"token id 122 in b needs model.vocab_size > 122, but it is 122"):
        load(tmp_path, fraction=cut, vocab_size=122)


def test_stdlib_takes_sources_once_and_leaves_tests_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {f"m{i}.py": f"x = {i}\n".encode() for i in range(20)}
    left_out = [
        "site-packages/p.py",
        "dist-packages/p.py",
        "test/t.py",
        "idlelib/idle_test/t.py",
        "a/tests/t.py",
        "n.txt",
    ]
    write(tmp_path, sources | dict.fromkeys(left_out, b"no") | {"empty.py": b"", "m5_again.py": sources["m5.py"]})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = load_corpus(DataConfig(validation_fraction=0.5), 256, 1)
    texts = (corpus.train.tobytes() + corpus.validation.tobytes()).split(b"\0")
    assert sorted(texts) == sorted([b"", *sources.values()])
    assert (corpus.num_files, corpus.left_out.names) == (20, {"empty": ["empty.py"], "a copy": ["m5_again.py"]})


def test_the_real_stdlib_is_there() -> None:
    corpus = load_corpus(DataConfig(), 256, 256)
    assert len(corpus.train) > 5_000_000
    assert 0.05 < len(corpus.validation) / len(corpus.train) < 0.2
    assert corpus.name.startswith("stdlib-3.")


def test_a_file_that_vanishes_or_grows_while_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"{name}.txt": name.encode() * 100 for name in "abc"})
    opened = Path.open

    def vanish(path: Path, *args: object) -> object:
        (tmp_path / "c.txt").unlink(missing_ok=True)
        return opened(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", vanish)
        with pytest.raises(ValueError, match=r"in data.paths cannot be read: .*No such file.*c.txt"):
            load(tmp_path)

    fstat = os.fstat
    calls = []

    def grow(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        if len(calls) == 2:  # between the two looks at the size of a.txt
            with opened(tmp_path / "a.txt", "ab") as file:
                file.write(b"more")
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(ValueError, match=r"in data.paths cannot be read: .*a.txt changes while it is read"):
        load(tmp_path)


def test_an_unreadable_standard_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match="absent, the standard library, cannot be read"):
        load_corpus(DataConfig(), 256, 1)
