"""Preparing corpora: Megatron's bytes, whatever the format, the workers and the kills; nothing is lost silently."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moe_dist.cli import main
from moe_dist.data.command import Watch
from moe_dist.data.index_writer import IndexWriter, Written, dtype_of, write_index
from moe_dist.data.indexed import check_index, document_starts
from moe_dist.data.prepare import inspect
from moe_dist.data.prepare.inspect import inspect_corpus
from moe_dist.data.prepare.job import prepare
from moe_dist.data.prepare.mark import Mark
from moe_dist.data.prepare.steps import BadRecord, Request
from moe_dist.data.prepared import tokenizer_beside
from moe_dist.data.tokenizers import load_tokenizer

TEXTS = ["one cat", 'two\ncats, "quoted"', "naïve 日本語", " blanks  ", "x" * 300]


class Quiet:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.marks: list[Mark] = []

    def begin(self, total: int, mark: Mark) -> None:
        self.total = total

    def step(self, mark: Mark) -> None:
        self.marks.append(mark)

    def say(self, line: str) -> None:
        self.lines.append(line)


def prepared(prefix: Path, *paths: Path, **options: Any) -> dict[str, Any]:
    request = Request([str(path) for path in paths], prefix, options.pop("tokenizer", "bytes"), **options)
    return prepare(request, Quiet())


def documents(prefix: Path) -> list[list[int]]:
    index, _ = check_index(str(prefix))
    ids = np.fromfile(f"{prefix}.bin", index.dtype)
    starts = np.concatenate([part[:-1] for part in document_starts(index, 2)])
    return [part.tolist() for part in np.split(ids, starts[1:])]


def texts_of(prefix: Path) -> list[str]:
    """The end of each document is checked, and taken off."""
    found = documents(prefix)
    assert all(ids[-1] == 0 for ids in found)
    return [bytes(ids[:-1]).decode() for ids in found]


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def megatron(prefix: Path, ids: list[list[int]], dtype: type) -> Path:
    datasets = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = datasets.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in ids:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def same_files(one: Path, other: Path) -> bool:
    return all(Path(f"{one}{end}").read_bytes() == Path(f"{other}{end}").read_bytes() for end in (".bin", ".idx"))


@pytest.mark.parametrize("vocab_size", [256, 65_499, 65_500, 200_000])
def test_the_writer_is_megatrons_byte_by_byte(tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    monkeypatch.setattr("moe_dist.data.index_writer._CHUNK", 7)
    rng, dtype = np.random.default_rng(vocab_size), dtype_of(vocab_size)
    assert dtype == np.dtype(datasets.DType.optimal_dtype(vocab_size))
    ids = [rng.integers(0, vocab_size, rng.integers(1, 40)).tolist() for _ in range(50)]
    writer = IndexWriter(tmp_path, vocab_size)
    for first in range(0, 50, 9):
        some = [np.array(document, dtype) for document in ids[first : first + 9]]
        writer.add(np.concatenate(some).tobytes(), np.array([len(each) for each in some]))
    writer.close()
    write_index(tmp_path / "lengths", dtype, tmp_path / "ours.idx")
    (tmp_path / "tokens").rename(tmp_path / "ours.bin")
    assert same_files(tmp_path / "ours", megatron(tmp_path / "theirs", ids, dtype.type))
    read = datasets.IndexedDataset(str(tmp_path / "ours"))  # and Megatron reads ours
    assert [read[i].tolist() for i in range(len(read))] == ids == documents(tmp_path / "ours")


def test_a_document_in_parts_and_one_too_long(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path, 256)
    two = np.array([1, 2], "<u2").tobytes()
    writer.add(two, np.array([2]), ends=False)
    writer.add(two, np.array([2]), ends=False)
    writer.add(two + two, np.array([1, 3]))
    writer.close()
    assert np.fromfile(tmp_path / "lengths", "<i4").tolist() == [5, 3] and writer.written.documents == 2
    again = IndexWriter(tmp_path, 256, writer.written)
    again.written = type(again.written)(0, 0, 2**31 - 2)
    with pytest.raises(ValueError, match="a document has 2147483648 tokens, but an index says at most 2147483647"):
        again.add(two, np.array([2]))


def parquet(path: Path, texts: list[str]) -> Path:
    package = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    package.write_table(arrow.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=2)
    return path


def dataset(folder: Path, texts: list[str]) -> Path:
    """As `datasets` 2 and later save one: Arrow streams, and state.json that names them in order."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, some in zip(names, (texts[:2], texts[2:]), strict=True):
        table = arrow.table({"text": some})
        with (folder / name).open("wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_a_dataset_that_datasets_itself_saved(tmp_path: Path) -> None:
    package = pytest.importorskip("datasets")
    saved = package.Dataset.from_dict({"text": TEXTS[::-1]}).select(range(len(TEXTS))[::-1])
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    prepared(tmp_path / "c", tmp_path / "saved")
    assert texts_of(tmp_path / "c") == TEXTS


def written(folder: Path, form: str) -> Path:
    """TEXTS in a form."""
    plain = jsonl(folder / "plain", TEXTS).read_bytes()
    match form:
        case "jsonl.gz":
            (folder / f"a.{form}").write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))
        case "jsonl.xz":
            (folder / f"a.{form}").write_bytes(lzma.compress(plain))
        case "jsonl.bz2":
            (folder / f"a.{form}").write_bytes(bz2.compress(plain))
        case "jsonl.zst":
            codec = pytest.importorskip("pyarrow").Codec("zstd")
            (folder / f"a.{form}").write_bytes(codec.compress(plain, asbytes=True))
        case "jsonl":
            jsonl(folder / "a.jsonl", TEXTS)
        case "ndjson":  # UTF-16 with its mark
            (folder / "a.ndjson").write_bytes(plain.decode().encode("utf-16"))
        case "csv":
            with (folder / "a.csv").open("w", newline="") as file:
                rows = csv.writer(file, quoting=csv.QUOTE_ALL)
                rows.writerows([["n", "text"], *([str(n), text] for n, text in enumerate(TEXTS))])
        case "parquet":
            return parquet(folder / "a.parquet", TEXTS)
        case "dataset":
            return dataset(folder / "saved", TEXTS)
        case "folder":
            (folder / "in/deep").mkdir(parents=True)
            for n, text in enumerate(TEXTS):
                (folder / "in" / ("deep" if n > 2 else "") / f"{n if n < 3 else n - 3}.txt").write_bytes(text.encode())
            return folder / "in"
    return folder / f"a.{form}"


FORMS = ["jsonl", "ndjson", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst", "csv", "parquet", "dataset", "folder"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format(tmp_path: Path, form: str) -> None:
    record = prepared(tmp_path / "c", written(tmp_path, form))
    assert texts_of(tmp_path / "c") == TEXTS
    assert (record["documents"], record["bad"], record["empty"]) == (len(TEXTS), {}, 0)
    assert record["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS)


def test_bad_records_are_counted_named_and_refused_when_asked(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "{broken", '["list"]', '{"txt": "b"}', '{"text": null}', '{"text": "\\ud800"}', "", ""]
    lines += ['{"text": ""}', '{"text": 7}', '{"text": "last"}', '{"text": true}']
    source = tmp_path / "a.jsonl"
    source.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    record = prepared(tmp_path / "c", source)
    assert texts_of(tmp_path / "c") == ["a", "7", "last"]
    named = [json.loads(line) for line in (tmp_path / "c.bad.jsonl").read_text().splitlines()]
    assert [each["line"] for each in named] == [2, 3, 4, 5, 6, 12, 13] and {each["file"] for each in named} == {
        str(source)
    }
    assert named[5]["reason"].startswith("true at 'text' is no text")
    assert sum(record["bad"].values()) == 7 and record["empty"] == 1
    with pytest.raises(BadRecord, match=r"a.jsonl, line 2: not JSON"):
        prepared(tmp_path / "d", source, strict=True)
    assert not (tmp_path / "d.bin").exists()


@pytest.mark.parametrize("rows", [True, False])
def test_bad_rows_of_csv_and_parquet(tmp_path: Path, rows: bool) -> None:
    if rows:
        source = parquet(tmp_path / "a.parquet", ["a", None, "b"])  # type: ignore[list-item]
    else:
        source = tmp_path / "a.csv"
        source.write_bytes(b'text,n\na,1\n"b,"x",2\nc,1,2\n\xff,3\nb,4\n')
    prepared(tmp_path / "c", source)
    assert texts_of(tmp_path / "c") == ["a", "b"]
    named = [json.loads(line) for line in (tmp_path / "c.bad.jsonl").read_text().splitlines()]
    assert [each["row" if rows else "line"] for each in named] == ([2] if rows else [3, 4, 5])
    with pytest.raises(ValueError, match=r"has no column 'words', but (n, )?text"):
        prepared(tmp_path / "d", source, text_key="words")


def test_what_cannot_be_read_to_its_end_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = jsonl(tmp_path / "plain", [rng.bytes(600).hex() for _ in range(2000)]).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(whole)[:-4000])
    jsonl(tmp_path / "b.jsonl", ["after"])
    record = prepared(tmp_path / "c", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl")
    half, named = [json.loads(line) for line in (tmp_path / "c.bad.jsonl").read_text().splitlines()]
    assert named["reason"].startswith("cannot be read from here on: ") and sum(record["bad"].values()) == 2
    assert half["reason"].startswith("not JSON") and half["line"] == named["line"]
    assert texts_of(tmp_path / "c")[-1] == "after" and record["documents"] == named["line"] > 1900


def packed(form: str, data: bytes) -> bytes:
    if form == "zst":
        found: bytes = pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
        return found
    return {"gz": gzip, "xz": lzma, "bz2": bz2}[form].compress(data)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("form", ["gz", "xz", "bz2", "zst"])
@pytest.mark.parametrize(("share", "kind"), [(0.7, "txt"), (0.7, "jsonl"), (0.05, "txt"), (0.05, "csv")])
def test_a_packed_file_that_breaks_off_is_named(form: str, share: float, kind: str, tmp_path: Path) -> None:
    """A text too, which is shorter than a block; and where not even what it begins with can be unpacked."""
    rng = np.random.default_rng(3)
    texts = [rng.bytes(40).hex() for _ in range(2000)]
    plain = {"txt": "\n".join(texts), "jsonl": "\n".join(json.dumps({"text": text}) for text in texts)}
    plain["csv"] = "text\n" + plain["txt"]
    data = packed(form, plain[kind].encode())
    broken, whole = tmp_path / f"in/a.{kind}.{form}", tmp_path / "in/b.txt"
    broken.parent.mkdir()
    broken.write_bytes(data[: int(len(data) * share)])
    whole.write_text("after")
    record = prepared(tmp_path / "c", tmp_path / "in")
    named = [json.loads(line) for line in (tmp_path / "c.bad.jsonl").read_text().splitlines()]
    assert named[-1]["file"] == str(broken) and "cannot be read from here on" in named[-1]["reason"]
    assert sum(record["bad"].values()) == len(named) and texts_of(tmp_path / "c")[-1] == "after"
    if kind == "txt" and share > 0.5 and form in ("gz", "xz"):  # the others unpack a block as a whole
        assert plain[kind].startswith(texts_of(tmp_path / "c")[0])
    with pytest.raises(BadRecord, match=rf"a\.{kind}\.{form}, line \d+: "):
        prepared(tmp_path / "d", tmp_path / "in", strict=True)
    with pytest.raises(BadRecord):
        prepared(tmp_path / "e", broken, strict=True)


def test_texts_that_are_no_utf8_and_empty_ones(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in (("a", b"good"), ("b", b"bad \xff"), ("c", b""), ("d", b"\0binary"), ("e", b"also")):
        (folder / name).write_bytes(data)
    tokenizer = pytest.importorskip("tests.unit.data.test_tokenizers").byte_level(tmp_path / "tok")
    record = prepared(tmp_path / "c", folder, tokenizer=str(tokenizer))
    assert (record["documents"], record["bad"], record["empty"]) == (2, {"not UTF-8": 1}, 1)
    assert record["left_out"] == {"binary": {"count": 1, "names": [str(folder / "d")]}}
    found = tokenizer_beside(str(tmp_path / "c"))
    assert found is not None and [found.decode(ids) for ids in documents(tmp_path / "c")] == [
        "good<|endoftext|>",
        "also<|endoftext|>",
    ]


def test_workers_and_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    words = [word.decode() for word in (b"the", b"cat", b"sat\n", b"\n\n", "日本".encode(), b"12.5")]
    texts = [" ".join(rng.choice(words, rng.integers(1, 200))) for _ in range(300)]
    tokenizer = str(pytest.importorskip("tests.unit.data.test_tokenizers").byte_level(tmp_path / "tok"))
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/a.jsonl", texts)
    (tmp_path / "in/b.txt").write_text("the cat sat\n" * 500)
    prepared(tmp_path / "one", tmp_path / "in", tokenizer=tokenizer)
    prepared(tmp_path / "two", tmp_path / "in", tokenizer=tokenizer, workers=2)
    for module in ("documents", "prepare.blocks", "prepare.work"):
        monkeypatch.setattr(f"moe_dist.data.{module}.BLOCK", 1000)
    prepared(tmp_path / "small", tmp_path / "in", tokenizer=tokenizer)
    plain = load_tokenizer(tokenizer)
    expected = [[*plain.encode(text), plain.end_id] for text in [*texts, "the cat sat\n" * 500]]
    theirs = megatron(tmp_path / "theirs", expected, np.uint16)
    for name in ("one", "two", "small"):
        assert same_files(tmp_path / name, theirs)


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from moe_dist.data import documents
from moe_dist.data.index_writer import IndexWriter
from moe_dist.data.prepare import blocks, job, steps, work
for module in (documents, blocks, work):
    module.BLOCK = 2000
name, after, prefix, *sources = sys.argv[1:]
home, after = {"add": IndexWriter, "replace": os}[name], int(after)
work_on = getattr(home, name)
def dying(*args, **options):
    global after
    done = work_on(*args, **options)
    after -= name == "add" or str(args[1]).startswith(prefix + ".") and ".preparing" not in str(args[1])
    if after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
setattr(home, name, dying)
quiet = lambda *args: None
watcher = SimpleNamespace(begin=quiet, step=quiet, say=quiet)
job.prepare(steps.Request(sources, Path(prefix), "bytes", mark_every=0.0), watcher)
"""


@pytest.mark.parametrize(("call", "after"), [("add", [3, 9, 1, 9, 2, 1]), ("replace", [1, 1, 1, 1])])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, call: str, after: list[int]) -> None:
    """Within the work, behind its last mark; and between the files' coming to their names: .bin, .idx, .bad.jsonl and
    .json."""
    rng = np.random.default_rng(2)
    jsonl(tmp_path / "a.jsonl", [rng.bytes(100).hex() for _ in range(60)])
    (tmp_path / "b.txt").write_text("a line\n" * 1500)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes() + b"{bad\n")[:-2000])
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([rng.bytes(100).hex()] for _ in range(30))])
    parquet(tmp_path / "e.parquet", [rng.bytes(100).hex() for _ in range(33)])
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.csv", "e.parquet")]
    whole = prepared(tmp_path / "whole", *map(Path, sources))
    for number in after:
        command = [sys.executable, "-c", KILLED, call, str(number), str(tmp_path / "c"), *sources]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    again = prepare(Request(sources, tmp_path / "c", "bytes"), Quiet())
    assert same_files(tmp_path / "c", tmp_path / "whole") and again["digest"] == whole["digest"]
    assert (tmp_path / "c.bad.jsonl").read_bytes() == (tmp_path / "whole.bad.jsonl").read_bytes()
    assert not (tmp_path / "c.preparing").exists() and again["bad"] == whole["bad"]


def test_what_was_begun_otherwise_or_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a", "b"])
    with source.open("a") as file:
        file.write("{bad\n")
    with pytest.raises(BadRecord):
        prepared(tmp_path / "c", source, strict=True)
    with pytest.raises(ValueError, match=r"there is no document|c.preparing was begun with other text_key"):
        prepared(tmp_path / "c", source, text_key="other")
    assert prepared(tmp_path / "d", source)["documents"] == 2
    watcher = Quiet()
    prepare(Request([str(source)], tmp_path / "d", "bytes"), watcher)
    assert watcher.lines == [f"{tmp_path}/d.bin has been prepared from these files already"]
    jsonl(source, ["other"])
    with pytest.raises(ValueError, match=r"d.json is there already, of other files or settings"):
        prepared(tmp_path / "d", source)


def test_sources_that_are_not_there_or_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is neither a file nor a folder"):
        prepared(tmp_path / "c", tmp_path / "absent")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"holds no text \(1 left out: 1 binary"):
        prepared(tmp_path / "c", tmp_path / "in")
    with pytest.raises(ValueError, match=r"x is binary: give text"):
        prepared(tmp_path / "c", tmp_path / "in/x")
    with pytest.raises(ValueError, match="there is no document in 1 files: 1 are empty and 0 bad"):
        prepared(tmp_path / "c", jsonl(tmp_path / "e.jsonl", [""]))
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"name one of them, .*/in/NAME of train, test"):
        prepared(tmp_path / "c", tmp_path / "in")


def test_memory_is_constant(tmp_path: Path) -> None:
    """Twice as many documents, hardly more memory: the peak of a process of its own."""
    peaks = []
    for count in (1, 2):
        with (tmp_path / f"{count}.jsonl").open("w") as file:
            line = json.dumps({"text": "a few words of text " * 40}) + "\n"
            file.writelines(line for _ in range(8_000 * count))
        code = "import resource, sys; from moe_dist.cli import main; code = main(sys.argv[1:]); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        command = ["data", "prepare", str(tmp_path / f"{count}.jsonl"), "--tokenizer", "bytes", "--workers", "1"]
        command += ["--output", str(tmp_path / f"c{count}")]
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] * 1.1  # KiB


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", ["the cat sat on the mat"] * 30 + ["{"])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{bad\n")
    assert main(["data", "tokenizer", "train", "a.jsonl", "--vocab-size", "265", "--output", "tok"]) == 0
    said = capsys.readouterr()
    assert "tok holds a tokenizer of 265 ids" in said.out and "left out: a.jsonl, line 32: not JSON" in said.err
    command = ["data", "prepare", "a.jsonl", "--tokenizer", "tok", "--output", "out/c", "--workers", "1"]
    assert main([*command, "--strict"]) == 2
    assert "a.jsonl, line 32: not JSON" in capsys.readouterr().err
    assert main(command) == 0
    said = capsys.readouterr()
    assert "out/c: 31 documents," in said.out and "1 bad records are not in it (1 not JSON)" in said.out
    assert "\x1b" not in said.err
    assert main(["data", "inspect", "out/c", "--samples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "the cat sat on the mat<|endoftext|>" in shown and "--- document 30\n{<|endoftext|>" in shown
    assert main(["data", "inspect", "out/c.bin", "--json", "--samples", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    lengths = [len(document) for document in documents(tmp_path / "out/c")]
    assert found["lengths"]["mean"] == pytest.approx(np.mean(lengths)) and found["lengths"]["most"] == max(lengths)
    assert main(["data", "tokenizer", "train", "a.jsonl", "--vocab-size", "265", "--output", "tok"]) == 2
    assert main(["data", "tokenizer", "teach"]) == 2 and main(["data"]) == 2
    assert main(["data", "inspect", "nothing"]) == 2
    with (tmp_path / "out/c.bin").open("r+b") as file:
        file.write(b"\x05\x01")
    assert main(["data", "inspect", "out/c"]) == 2
    assert "out/c.bin changed since out/c.json was written" in capsys.readouterr().err


def test_what_a_person_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar in a terminal; elsewhere a line now and then."""
    mark = Mark(written=Written(50, 3), read=60, bad={"not JSON": 1})
    for terminal in (True, False):
        shown = io.StringIO()
        watch = Watch(Console(file=shown, force_terminal=terminal, width=200))
        monkeypatch.setattr("moe_dist.data.command._EVERY", 0.0)
        watch.begin(100, Mark(written=Written(40, 2), read=50))
        watch.step(mark)
        watch.end()
        assert "3 documents, 50 tokens, 1 bad" in shown.getvalue() and "60%" in shown.getvalue()
        assert ("\x1b" in shown.getvalue()) == terminal


def test_a_corpus_of_megatrons_is_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = megatron(tmp_path / "c", [[5, 6, 7], [8], [9, 10, 11, 12]], np.int32)
    monkeypatch.setattr(inspect, "_CHUNK", 2)
    found = inspect_corpus(str(prefix), None, 3)
    assert (found["documents"], found["tokens"], found["largest_id"], found["bad"]) == (3, 8, 12, None)
    assert found["samples"] == {0: "5 6 7", 1: "8", 2: "9 10 11 12"}
    assert os.path.getsize(f"{prefix}.bin") == 32
