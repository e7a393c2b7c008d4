"""Megatron's indexed corpora: read as Megatron wrote them, cut by documents, and every lie in them refused."""

import os
import random
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.config import Config, validate
from moe_dist.config.schema import DataConfig
from moe_dist.data import indexed
from moe_dist.data.corpus import Corpus, load_corpus
from moe_dist.data.indexed import check_index, read_indexed
from moe_dist.data.sampler import SequenceSampler, micro_batch
from moe_dist.data.stream import TokenStream
from moe_dist.train.tasks import make_task

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [], [[11, 12, 13, 14]], [[15]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16, modes: bool = False) -> Path:
    """By Megatron's own builder."""
    datasets = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = datasets.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence), *([1] if modes else []))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def load(*paths: Path, fraction: float = 0.3, vocab_size: int = 1000, seq_len: int = 1) -> Corpus:
    config = DataConfig(kind="indexed", paths=[str(path) for path in paths], validation_fraction=fraction)
    return load_corpus(config, vocab_size, seq_len)


def tokens(stream: TokenStream) -> list[int]:
    return stream[np.arange(len(stream))].tolist()


def random_documents(seed: int, largest: int) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(0, largest, rng.integers(1, 50)).tolist() for _ in range(rng.integers(0, 4))] for _ in range(40)
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("modes", [False, True])
def test_reads_what_megatron_wrote(tmp_path: Path, dtype: type, modes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "corpus.v1", random_documents(1, min(50_000, np.iinfo(dtype).max + 1)), dtype, modes)
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset(str(prefix), multimodal=modes)
    expected = np.concatenate([theirs[i][0] if modes else theirs[i] for i in range(len(theirs))])
    monkeypatch.setattr(indexed, "_CHUNK", 7)  # so that every check crosses from one chunk to the next
    index, _ = check_index(str(prefix))
    assert (index.sequences, index.documents) == (len(theirs), len(theirs.document_indices) - 1)
    with (tmp_path / "corpus.v1.idx").open("rb") as file:
        ours = [index.document_start(file, document) for document in range(index.documents + 1)]
    pointers = np.append(theirs.index.sequence_pointers, expected.nbytes)
    assert ours == (pointers[theirs.document_indices] // np.dtype(dtype).itemsize).tolist()
    train, validation, *_ = read_indexed([str(prefix)], 50_000, 0.2)
    assert tokens(train) + tokens(validation) == expected.tolist()
    assert len(train) in ours


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)  # documents begin at tokens 0, 4, 6, 6, 10; there are 11
    for fraction, cut in ((0.05, 10), (0.1, 10), (0.3, 10), (0.4, 6), (0.5, 6), (0.6, 4), (0.65, 4), (0.95, 4)):
        train, validation, *_ = read_indexed([str(prefix)], 1000, fraction)
        assert tokens(train) == list(range(5, 5 + cut)), fraction
        assert tokens(validation) == list(range(5 + cut, 16)), fraction


def test_a_single_document_is_cut_inside(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "c", [[], [[1, 2, 3], [4]], []]), fraction=0.5)
    assert (tokens(corpus.train), tokens(corpus.validation)) == ([1, 2], [3, 4])


def test_several_prefixes_of_several_types(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2]], [[3]]], np.uint8)
    write(tmp_path / "b", [[[400]], [[500]]], np.int32)
    corpus = load(tmp_path / "a.bin", tmp_path / "b.idx")
    assert (tokens(corpus.train), tokens(corpus.validation)) == ([1, 2, 400], [3, 500])
    assert (corpus.num_files, corpus.unit) == (2, "token")
    tokens_BS, targets_BS = micro_batch(corpus.train, np.array([0, 1]), 1)
    assert tokens_BS.tolist() == [[1], [2]] and targets_BS.tolist() == [[2], [400]]
    assert tokens_BS.dtype == torch.int64


def test_the_digest_covers_everything(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)

    def digest(fraction: float = 0.5) -> str:
        return load(prefix, fraction=fraction).digest

    seen = [digest(), digest(fraction=0.7)]
    for documents, dtype in (
        (DOCUMENTS, np.int32),
        ([[[5, 6, 7], [9]], *DOCUMENTS[1:]], np.uint16),  # another token
        ([DOCUMENTS[0], [[9], [10]], *DOCUMENTS[2:]], np.uint16),  # the same tokens in other sequences
    ):
        write(prefix, documents, dtype)
        seen.append(digest())
    assert len(set(seen)) == 5
    write(prefix, DOCUMENTS)
    assert digest() == load(tmp_path / "c.idx", fraction=0.5).digest == seen[0]


def test_token_ids_outside_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 3)
    prefix = write(tmp_path / "c", DOCUMENTS)
    words = r"c.bin: token id 13 at offset 8 \(token 2 of document 3\) is not within model.vocab_size=13: raise"
    with pytest.raises(ValueError, match=words):
        load(prefix, vocab_size=13)
    assert load(prefix, fraction=0.5, vocab_size=16).vocab_size == 16
    with pytest.raises(ValueError, match=r"token id -1 at offset 1 .*document 0.* the file is damaged"):
        load(write(prefix, [[[1, -1]], [[2]]], np.int32))


def test_each_split_holds_a_sequence(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    with pytest.raises(ValueError, match=r"validation has 1 tokens, but seq_len=4 .*raise data.validation_fraction"):
        load(prefix, seq_len=4)


def test_rules_of_the_configuration() -> None:
    config = Config(data=DataConfig(kind="indexed", paths=["c"]))
    config.model.vocab_size = 64  # no bytes, so less than 256 is fine
    validate(config, 1)
    config.data.paths, config.data.end_of_text = [], "</s>"
    with pytest.raises(ValueError, match=r"(?s)end_of_text=</s> needs data.tokenizer.*"):
        validate(config, 1)
    with pytest.raises(ValueError, match=r"indexed needs paths"):
        validate(config, 1)


def test_a_sample_needs_a_tokenizer(tmp_path: Path) -> None:
    config = Config(data=DataConfig(kind="indexed", paths=[str(write(tmp_path / "c", DOCUMENTS))]))
    config.train.seq_len, config.run.sample_tokens, config.data.validation_fraction = 1, 5, 0.5
    with pytest.raises(ValueError, match=r"run.sample_tokens=5 asks for text, .*name the tokenizer in data.tokenizer"):
        make_task(config)


def test_corpora_that_are_held_out_as_a_whole(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", [[[20, 21]], [[22]]])
    config = DataConfig(kind="indexed", paths=[str(one)], validation_paths=[str(other)])
    corpus = load_corpus(config, 1000, 1)
    assert (tokens(corpus.train), tokens(corpus.validation)) == ([*range(5, 16)], [20, 21, 22])
    assert corpus.document_of(np.array([0, 10])).tolist() == [0, 4] and corpus.lengths == ([11], [3])
    assert corpus.digest != load(one, fraction=0.5).digest


def test_ten_billion_tokens_give_their_first_batch_in_seconds(tmp_path: Path) -> None:
    """A sparse file: what is not written is zeros, and takes no room. Of CPU time, whatever else the machine does."""
    documents, length, began = 10_000, 1_000_000, time.process_time()
    starts = np.arange(documents, dtype="<i8") * length
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
    body = np.full(documents, length, "<i4").tobytes() + (starts * 2).astype("<i8").tobytes()
    (tmp_path / "c.idx").write_bytes(head + body + np.arange(documents + 1, dtype="<i8").tobytes())
    with (tmp_path / "c.bin").open("wb") as file:
        file.truncate(documents * length * 2)
    corpus = load(tmp_path / "c", fraction=0.01, seq_len=4096)
    assert len(corpus.train) + len(corpus.validation) == 10**10 and corpus.sampled == [f"{tmp_path}/c.bin"]
    sampler = SequenceSampler(len(corpus.train), 4096, 8, seed=0)
    places = sampler.indices(0)
    tokens_BS, _ = micro_batch(corpus.train, places, 4096)
    assert tokens_BS.shape == (8, 4096) and not tokens_BS.any()
    assert time.process_time() - began < 5

    whole = corpus.digest
    with (tmp_path / "c.bin").open("r+b") as file:  # an id where nobody looked when the run began
        file.seek(2 * (int(places[3]) + 7))
        file.write(b"\xe8\x03")
    again = load(tmp_path / "c", fraction=0.01, seq_len=4096)
    with pytest.raises(
        ValueError, match=rf"c.bin: token id 1000 at offset {places[3] + 7} is not within .*=1000: raise"
    ):
        micro_batch(again.train, places, 4096)
    with (tmp_path / "c.bin").open("r+b") as file:  # and one where everybody looks
        file.write(b"\x01")
    assert load(tmp_path / "c", fraction=0.01, seq_len=4096).digest != whole


def idx(
    lengths: list[int] = [3, 1, 2],  # noqa: B006
    pointers: list[int] | None = None,
    documents: list[int] = [0, 2, 3],  # noqa: B006
    magic: bytes = b"MMIDIDX\0\0",
    version: int = 1,
    code: int = 8,
    counts: tuple[int, int] | None = None,
    more: bytes = b"",
) -> bytes:
    pointers = [0, 6, 8] if pointers is None else pointers
    head = magic + struct.pack("<QBQQ", version, code, *(counts or (len(lengths), len(documents))))
    body = (
        np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(documents, "<i8").tobytes()
    )
    return head + body + more


def test_the_files_made_by_hand_are_right(tmp_path: Path) -> None:
    write(tmp_path / "c", [[[1, 2, 3], [4]], [[5, 6]]])
    assert (tmp_path / "c.idx").read_bytes() == idx()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "size: it has 0 bytes, but the header alone takes 34"),
        (idx()[:33], "size: it has 33 bytes"),
        (idx()[:-1], "sequence count and document count: 3 and 3 take 94 bytes, or 97 with modes, but it has 93"),
        (idx(more=b"\0"), "but it has 95"),
        (idx(magic=b"MMIDIDX\0\1"), "magic: it opens with"),
        (idx(version=2), "version: 2, but only 1"),
        (idx(code=0), "dtype code: 0 is none of"),
        (idx(code=9), "dtype code: 9 is none of"),
        (idx(code=7), "dtype code: 7 means floating point"),
        (idx(counts=(0, 3)), "sequence count: 0"),
        (idx(counts=(3, 1)), "document count: 1"),
        (idx(counts=(2**63, 3)), "sequence count and document count: 9223372036854775808"),
        (idx(counts=(3, 2**64 - 1)), "sequence count and document count"),
        (idx(lengths=[3, -1, 4]), "sequence lengths: sequence 1 has length -1"),
        (idx(lengths=[3, 1, 2**31 - 1]), "c.bin: it has 6 tokens, but the sequence lengths"),
        (idx(lengths=[3, 1, 1]), "c.bin: it has 6 tokens, but the sequence lengths"),
        (idx(pointers=[0, 6, 10]), "sequence pointers: sequence 2 is said to begin at byte 10, .* add up to 8"),
        (idx(pointers=[-2, 6, 8]), "sequence pointers: sequence 0 is said to begin at byte -2"),
        (idx(pointers=[0, 2**63 - 1, 8]), "sequence pointers: sequence 1"),
        (idx(documents=[1, 2, 3]), "document indices: they start with 1"),
        (idx(documents=[0, 3, 2, 3]), "document indices: entry 2 is 2, after 3"),
        (idx(documents=[0, 2**63 - 1, -(2**63), 3]), "document indices: (entry 2 is -922|they end with 922)"),
        (idx(documents=[0, 2, 2]), "document indices: they end with 2, not the sequence count 3"),
        (idx(documents=[0, 2, 4]), "document indices: they end with 4"),
        (idx(code=4), "sequence pointers: sequence 1"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 1])
def test_damaged_indices(tmp_path: Path, data: bytes, words: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    prefix = write(tmp_path / "c", [[[1, 2, 3], [4]], [[5, 6]]])
    (tmp_path / "c.idx").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{tmp_path}/c\.(idx|bin): ") as caught:
        load(prefix)
    assert caught.match(words)


@pytest.mark.parametrize("size", [0, 2, 10, 11, 14])
def test_a_bin_of_another_size(tmp_path: Path, size: int) -> None:
    prefix = write(tmp_path / "c", [[[1, 2, 3], [4]], [[5, 6]]])
    (tmp_path / "c.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=r"c.bin: (it is empty|its 11 bytes|it has \d tokens)"):
        load(prefix)


@pytest.mark.parametrize("absent", ["c.idx", "c.bin"])
def test_absent_files(tmp_path: Path, absent: str) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    (tmp_path / absent).unlink()
    with pytest.raises(ValueError, match=rf"{absent}: no such file; data.kind indexed reads"):
        load(prefix)
    (tmp_path / absent).mkdir()
    with pytest.raises(ValueError, match=rf"{absent}: no such file"):
        load(prefix)
    with pytest.raises(ValueError, match="no such file"):
        load(Path("a\0b"))


def truncated_at(call: int) -> Callable[..., bytes]:
    """pread, but the file ends at that call."""
    calls = 0

    def pread(descriptor: int, size: int, at: int) -> bytes:
        nonlocal calls
        calls += 1
        return indexed_pread(descriptor, size, at)[: None if calls < call else size // 2]

    return pread


indexed_pread = indexed.os.pread


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    monkeypatch.setattr(indexed.os, "pread", truncated_at(call))
    with pytest.raises(ValueError, match=r"c.idx: it became shorter while it was read"):
        load(prefix)


def test_windows_of_a_file_are_read_as_they_are_and_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the offsets, also in single bytes; past the end of a file that was cut there is nothing."""
    documents = random_documents(3, 1000)
    whole = np.array([token for document in documents for sequence in document for token in sequence])
    prefix = write(tmp_path / "c", documents)
    train, validation, *_ = read_indexed([str(prefix)], 1000, 0.3)
    offsets = np.random.default_rng(0).integers(0, len(train) - 9, (5, 1)) + np.array([[0, 1, 2, 3, 7, 8, 4, 4, 9]])
    assert np.array_equal(train[offsets], whole[offsets])
    preadv = indexed.os.preadv
    monkeypatch.setattr(indexed.os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:1]], at))
    assert np.array_equal(validation[np.arange(9)], whole[len(train) :][:9])
    indexed.os.truncate(f"{prefix}.bin", 2 * len(train) - 1)  # in the middle of the last token
    assert np.array_equal(train[np.arange(len(train) - 1)], whole[: len(train) - 1])
    for stream, offset in ((train, len(train) - 1), (validation, 0)):
        with pytest.raises(OSError, match=r"c\.bin has become shorter since the run began"):
            stream[np.array([offset])]


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    number = 40
    prefixes = [tmp_path / f"{i:02d}" for i in range(number)]
    for i, prefix in enumerate(prefixes):
        prefix.with_suffix(".bin").write_bytes(np.array([2 * i, 2 * i + 1], "<u2").tobytes())
        prefix.with_suffix(".idx").write_bytes(idx(lengths=[1, 1], pointers=[0, 2], documents=[0, 1, 2]))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + number // 2, before[1]))
    try:
        train, validation, *_ = read_indexed([str(prefix) for prefix in prefixes], 1000, 0.5)
        assert len(os.listdir("/proc/self/fd")) <= held  # none stays open for files that nobody has read from
        for part in (*train.parts, *validation.parts):
            part.files.most = 7
        assert tokens(train) == list(range(0, 2 * number, 2)) and tokens(validation) == list(range(1, 2 * number, 2))
        anyhow = np.random.default_rng(0).integers(0, number, (50, 3))
        assert np.array_equal(train[anyhow], 2 * anyhow) and np.array_equal(validation[anyhow], 2 * anyhow + 1)
        assert len(train.parts[0].files._files) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_file_that_is_replaced_while_it_is_not_open(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS)
    train, *_ = read_indexed([str(one), str(other)], 1000, 0.3)
    train.parts[0].files.most = 1
    assert tokens(train) == [*range(5, 15)] * 2  # b is open now, a is not
    for name in "ab":
        (tmp_path / "new").write_bytes((tmp_path / f"{name}.bin").read_bytes())
        (tmp_path / "new").rename(tmp_path / f"{name}.bin")
    assert train[np.array([10])].tolist() == [5]  # the open file is the old one
    with pytest.raises(OSError, match=r"a\.bin has changed since the run began: put it back as it was"):
        train[np.array([0])]
    (tmp_path / "a.bin").unlink()
    with pytest.raises(OSError, match="No such file"):
        train[np.array([0])]


EDGES = [0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)]


def mutated(data: bytes, number: int) -> bytes:
    rng = random.Random(number)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(6):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at : at + 1] = bytes([(out[at] if out else 0) ^ (1 << rng.randrange(8))])
            case 2:
                out[at : at + 8] = struct.pack("<q", rng.choice(EDGES))
            case 3:
                place = rng.choice([9, 17, 18, 26, 34, 38, 34 + 4 * 5])
                out[place : place + 8] = struct.pack("<q", rng.choice([*EDGES, rng.randrange(100)]))
            case 4:
                del out[at:]
            case _:
                out += rng.randbytes(rng.randrange(1, 40))
    return bytes(out)


def check_mutants(folder: Path, numbers: range) -> int:
    """How many were refused. The others are whole as Megatron reads them; nothing else may happen."""
    prefix = write(folder / "c", DOCUMENTS)
    good, refused = (folder / "c.idx").read_bytes(), 0
    for number in numbers:
        data = mutated(good, number)
        (folder / "c.idx").write_bytes(data)
        try:
            train, validation, *_ = read_indexed([str(prefix)], 1000, 0.3)
        except ValueError as error:
            assert str(error).startswith((f"{prefix}.idx: ", f"{prefix}.bin: ")), f"mutant {number}: {error}"
            refused += 1
            continue
        assert tokens(train) + tokens(validation) == list(range(5, 16)), f"mutant {number}"
        lengths = struct.unpack_from("<5i", data, 34)
        assert data[:18] == good[:18] and min(lengths) >= 0 and sum(lengths) == 11, f"mutant {number}"
    return refused


def test_mutants(tmp_path: Path) -> None:
    check_mutants(tmp_path, range(20))  # what is allocated once
    tracemalloc.start()
    refused = check_mutants(tmp_path, range(300))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 250
    assert peak < 2**20, f"{peak} bytes"


@pytest.mark.slow
def test_many_mutants(tmp_path: Path) -> None:
    assert check_mutants(tmp_path, range(300, 10_300)) > 8_000


def test_which_document_a_token_is_of(tmp_path: Path) -> None:
    """Beside a list of every token of two corpora; the last documents of each are held out."""
    documents = [random_documents(seed, 900) for seed in (2, 3)]
    paths = [write(tmp_path / f"c{number}", each) for number, each in enumerate(documents)]
    corpus, expected, first = load(*paths), list[int](), 0
    for each, part in zip(documents, corpus.train.parts, strict=True):
        of_tokens = [first + number for number, doc in enumerate(each) for sequence in doc for _ in sequence]
        expected += of_tokens[: len(part)]
        first += len(each)
    offsets = np.random.default_rng(0).permutation(len(expected))
    assert corpus.document_of(offsets).tolist() == [expected[offset] for offset in offsets]
