"""Prepares a corpus: blocks go to workers, what comes back is written in the order of the sources.

So the files do not depend on how many workers there are, nor on how often the work was interrupted: at every mark all
that is written lies on the disk, and so does the place in the sources where it ends. The next start cuts off what is
behind the mark and reads on from there.

    PREFIX.preparing/   tokens, lengths, bad.jsonl   as far as they go
                        state.json                   the last mark, and the settings, which must not change
                        lock                         held while somebody prepares
    PREFIX.bin, .idx    the corpus, in Megatron's format
    PREFIX.tokenizer/   the tokenizer, which training and `moe-dist generate` read
    PREFIX.bad.jsonl    records that are not in it, if there are any: file, line, reason
    PREFIX.json         what it is: written last
"""

import codecs
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_dist.data.documents import UNREADABLE, LeftOut, open_text
from moe_dist.data.index_writer import IndexWriter, Written, dtype_of, index_writer, write_index
from moe_dist.data.prepare.blocks import Block, Place, Unreadable, read_blocks
from moe_dist.data.prepare.sources import Kind, Source, find_sources
from moe_dist.data.prepare.work import Encoded, Encoder, encode_in_worker, start_worker
from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer
from moe_dist.data.tokenizers import load_tokenizer, save_tokenizer
from moe_dist.disk import flush, locked, replace_text

FORMAT = 1
_AHEAD = 3  # blocks for each worker that are read before they are asked for
_SHOWN = 3


class BadRecord(ValueError):
    """With strict, the first one."""


@dataclass(frozen=True)
class Request:
    """What to prepare. kind: of all sources; None: as their names say. workers: 1 works in this process. strict: a bad
    record ends it. mark_every: seconds between two marks."""

    paths: list[str]
    prefix: Path
    tokenizer: str
    end_of_text: str | None = None
    text_key: str = "text"
    kind: Kind | None = None
    workers: int = 1
    strict: bool = False
    mark_every: float = 5.0


@dataclass(frozen=True)
class Mark:
    """How far it is: sources that are done, the place in the next one, what is written. read: bytes of all sources.
    bad, empty: how many records of each reason are left out. bad_bytes: of bad.jsonl."""

    source: int = 0
    place: Place = field(default_factory=Place)
    written: Written = field(default_factory=Written)
    read: int = 0
    bad_bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    empty: int = 0

    @staticmethod
    def of(record: dict[str, Any]) -> "Mark":
        parts = {"place": Place(**record["place"]), "written": Written(**record["written"])}
        return Mark(**(record | parts))


class Watcher(Protocol):
    """Is told how the work goes on."""

    def begin(self, total: int, mark: Mark) -> None:
        """total: bytes of all sources."""

    def step(self, mark: Mark) -> None:
        """After each block."""

    def say(self, line: str) -> None:
        """For the person who waits."""


def prepare(request: Request, watcher: Watcher) -> dict[str, Any]:
    """Returns what PREFIX.json says. Continues what an interrupted call with the same settings has begun.

    Raises ValueError for what a user got wrong: sources, tokenizer, other settings than those that it was begun with, a
    corpus that is there already, and with `strict` a bad record (BadRecord).
    """
    tokenizer = load_tokenizer(request.tokenizer, request.end_of_text)
    left_out = LeftOut()
    sources = find_sources(request.paths, request.kind, left_out)
    settings = _settings(request, tokenizer, sources)
    known = _finished(request.prefix, settings)
    if known is not None:
        watcher.say(f"{request.prefix}.bin has been prepared from these files already")
        return known
    if len(left_out):
        watcher.say(left_out.describe())
    folder = Path(f"{request.prefix}.preparing")
    with locked(folder / "lock", wait=False) as held:
        if held is None:
            raise ValueError(f"{folder} is being worked on by another process: wait for it, or stop it")
        mark, complete = _taken_up(folder, settings)
        if mark.read:
            watcher.say(f"going on with {folder}: {mark.written.documents} documents are there")
        if not complete:
            mark = _Job(request, tokenizer, sources, settings, folder, watcher).run(mark)
        return _publish(request.prefix, folder, tokenizer, settings, mark, left_out)


class _Job:
    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        sources: list[Source],
        settings: dict[str, Any],
        folder: Path,
        watcher: Watcher,
    ) -> None:
        self.request, self.tokenizer, self.sources = request, tokenizer, sources
        self.settings, self.folder, self.watcher = settings, folder, watcher
        self.before = np.cumsum([0, *(source.size for source in sources)]).tolist()

    def run(self, mark: Mark) -> Mark:
        self.watcher.begin(self.before[-1], mark)
        with (
            index_writer(self.folder, self.tokenizer.vocab_size, mark.written) as writer,
            self._bad(mark) as self.bad,
            _workers(self.request) as pool,
        ):
            marked = time.monotonic()
            for now in self._steps(mark, writer, pool):
                mark = now
                self.watcher.step(mark)
                if time.monotonic() - marked >= self.request.mark_every:
                    self._set(mark, writer)
                    marked = time.monotonic()
            self._set(mark, writer, complete=True)
        return mark

    @contextmanager
    def _bad(self, mark: Mark) -> Iterator[Any]:
        with (self.folder / "bad.jsonl").open("ab") as file:
            file.truncate(mark.bad_bytes)
            yield file

    def _set(self, mark: Mark, writer: IndexWriter, complete: bool = False) -> None:
        writer.sync()
        self.bad.flush()
        os.fsync(self.bad.fileno())
        _write_state(self.folder, self.settings, mark, complete)

    def _steps(self, mark: Mark, writer: IndexWriter, pool: Executor | None) -> Iterator[Mark]:
        """Works, and says after each block how far it is."""
        encoder = Encoder(self.tokenizer, self.request.text_key) if pool is None else None
        waiting: deque[tuple[int, Block | Unreadable | None, Future[Encoded] | Encoded | None]] = deque()
        most = 0 if pool is None else _AHEAD * self.request.workers
        for number, block in self._blocks(mark):
            done: Future[Encoded] | Encoded | None = None
            if isinstance(block, Block):
                kind = self.sources[number].kind
                if pool is not None:
                    done = pool.submit(encode_in_worker, kind, block)
                else:
                    assert encoder is not None
                    done = encoder.encode(kind, block)
            waiting.append((number, block, done))
            while len(waiting) > most:
                mark = self._take(mark, writer, *waiting.popleft())
                yield mark
        while waiting:
            mark = self._take(mark, writer, *waiting.popleft())
            yield mark

    def _blocks(self, mark: Mark) -> Iterator[tuple[int, Block | Unreadable | None]]:
        """Of all sources from a mark on; None behind the last of each."""
        place = mark.place
        for number in range(mark.source, len(self.sources)):
            source = self.sources[number]
            try:
                if source.kind == "text" and place == Place() and not isinstance(self.tokenizer, ByteTokenizer):
                    _check_utf8(source)
                for block in read_blocks(source, place, self.request.text_key):
                    yield number, block
            except Unreadable as problem:
                yield number, problem
            status = os.stat(source.path)
            if (status.st_size, status.st_mtime_ns) != (source.size, source.changed):
                raise ValueError(f"{source.path} changed while it was read: start again when it is finished")
            yield number, None
            place = Place()

    def _take(
        self,
        mark: Mark,
        writer: IndexWriter,
        number: int,
        block: Block | Unreadable | None,
        done: Future[Encoded] | Encoded | None,
    ) -> Mark:
        """Writes a block's documents, and the names of its bad records."""
        source = self.sources[number]
        if isinstance(block, Unreadable):
            mark = self._note(mark, source, [(block.line, str(block))])
            if writer.written.open_length:
                end = np.array([self.tokenizer.end_id], writer.dtype)
                writer.add(end.tobytes(), np.ones(1, np.int64))
            return replace(mark, written=writer.written)
        if block is None:
            return replace(mark, source=number + 1, place=Place(), read=self.before[number + 1])
        try:
            encoded = done.result() if isinstance(done, Future) else done
        except BrokenProcessPool:
            raise RuntimeError(
                f"a worker has died at {source.path}, perhaps for want of memory: run it again, and it goes on; "
                "with fewer --workers if that was it"
            ) from None
        assert encoded is not None
        mark = self._note(mark, source, encoded.bad)
        try:
            writer.add(encoded.tokens, encoded.lengths, block.ends)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from None
        return replace(
            mark,
            place=block.place,
            written=writer.written,
            read=self.before[number] + min(block.read, source.size),
            empty=mark.empty + len(encoded.empty),
        )

    def _note(self, mark: Mark, source: Source, bad: list[tuple[int, str]]) -> Mark:
        counts, size = dict(mark.bad), mark.bad_bytes
        word = "row" if source.kind in ("parquet", "arrow") else "line"
        for line, reason in bad:
            if self.request.strict:
                raise BadRecord(f"{source.path}, {word} {line}: {reason}")
            text = json.dumps({"file": source.path, word: line, "reason": reason}) + "\n"
            size += self.bad.write(text.encode())
            short = reason.partition(":")[0].partition(",")[0]
            counts[short] = counts.get(short, 0) + 1
        return replace(mark, bad=counts, bad_bytes=size)


def _check_utf8(source: Source) -> None:
    """A text is in a corpus as a whole, or not at all. Raises Unreadable."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with Path(source.path).open("rb") as file:
            stream, _ = open_text(file)
            while data := stream.read(1 << 20):
                decoder.decode(data)
            decoder.decode(b"", final=True)
    except (*UNREADABLE, UnicodeError) as error:
        raise Unreadable(1, f"not UTF-8: {error}") from None


@contextmanager
def _workers(request: Request) -> Iterator[Executor | None]:
    if request.workers == 1:
        yield None
        return
    of_worker = (request.tokenizer, request.end_of_text, request.text_key)
    with ProcessPoolExecutor(request.workers, get_context("spawn"), start_worker, of_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _settings(request: Request, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
    """All that the files hang on."""
    return {
        "sources": [source.record() for source in sources],
        "text_key": request.text_key,
        "tokenizer": tokenizer.digest,
        "format": FORMAT,
    }


def _finished(prefix: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What PREFIX.json says of a corpus with these settings. Raises ValueError when another is there."""
    there = [path for path in (Path(f"{prefix}{end}") for end in (".json", ".bin", ".idx")) if path.exists()]
    if not there or Path(f"{prefix}.preparing").exists():
        return None
    try:
        known: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get("settings") == settings and len(there) == 3:
        return known
    raise ValueError(f"{there[0]} is there already, of other files or settings: remove it, or choose another --output")


def _taken_up(folder: Path, settings: dict[str, Any]) -> tuple[Mark, bool]:
    """(the last mark, whether all was done by then)."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Mark(), False
    except ValueError as error:
        raise ValueError(f"{folder}/state.json is damaged: {error}; remove {folder}") from None
    if differ := [name for name, value in settings.items() if state["settings"].get(name) != value]:
        raise ValueError(
            f"{folder} was begun with other {' and '.join(differ)}: continue it as it was begun, or remove it"
        )
    return Mark.of(state["mark"]), state["complete"]


def _write_state(folder: Path, settings: dict[str, Any], mark: Mark, complete: bool) -> None:
    state = {"settings": settings, "mark": asdict(mark), "complete": complete}
    replace_text(folder / "state.json", json.dumps(state, indent=1))


def _publish(
    prefix: Path,
    folder: Path,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    mark: Mark,
    left_out: LeftOut,
) -> dict[str, Any]:
    """Gives the files their names; it does what is left of that when it is called again."""
    if mark.written.documents == 0:
        raise ValueError(
            f"there is no document in {len(settings['sources'])} files: {mark.empty} are empty and "
            f"{sum(mark.bad.values())} bad ({folder}/bad.jsonl); remove {folder}"
        )
    dtype = dtype_of(tokenizer.vocab_size)
    if (folder / "lengths").exists():
        write_index(folder / "lengths", dtype, folder / "index")
    for name, end in (("tokens", "bin"), ("index", "idx"), ("bad.jsonl", "bad.jsonl")):
        path = folder / name
        if path.exists() and (name != "bad.jsonl" or mark.bad_bytes):
            os.replace(path, f"{prefix}.{end}")
        if name == "index":
            (folder / "lengths").unlink(missing_ok=True)
    save_tokenizer(tokenizer, Path(f"{prefix}.tokenizer"))
    record = {
        "format": FORMAT,
        "documents": mark.written.documents,
        "tokens": mark.written.tokens,
        "dtype": dtype.name,
        "digest": {end: digest_of(Path(f"{prefix}.{end}")) for end in ("bin", "idx")},
        "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
        | {"end_of_text": tokenizer.end_id},
        "bad": mark.bad,
        "empty": mark.empty,
        "left_out": left_out.record(),
        "settings": settings,
    }
    replace_text(Path(f"{prefix}.json"), json.dumps(record, indent=1))
    flush(prefix.parent)
    shutil.rmtree(folder)
    return record


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summary_of(record: dict[str, Any]) -> str:
    """A corpus in a line. record: of PREFIX.json."""
    bad, empty = sum(record["bad"].values()), record["empty"]
    said = f"{record['documents']:,} documents, {record['tokens']:,} tokens as {record['dtype']}"
    if empty:
        said += f"; {empty:,} empty"
    if bad:
        reasons = sorted(record["bad"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:_SHOWN])
        said += f"; {bad:,} bad records are not in it ({shown}{', ...' if len(reasons) > _SHOWN else ''})"
    return said
