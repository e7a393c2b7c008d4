"""The work itself: blocks go to workers, what comes back is written in the order of the sources, and marked."""

import codecs
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_dist.data.documents import UNREADABLE, open_text
from moe_dist.data.index_writer import IndexWriter, index_writer
from moe_dist.data.prepare.blocks import Block, Place, Unreadable, read_blocks
from moe_dist.data.prepare.mark import Mark, write_state
from moe_dist.data.prepare.sources import Kind, Source
from moe_dist.data.prepare.work import Encoded, Encoder, encode_in_worker, start_worker
from moe_dist.data.tokenizer import ByteTokenizer, Tokenizer

_AHEAD = 3  # blocks for each worker that are read before they are asked for


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


class Watcher(Protocol):
    """Is told how the work goes on."""

    def begin(self, total: int, mark: Mark) -> None:
        """total: bytes of all sources."""

    def step(self, mark: Mark) -> None:
        """After each block."""

    def say(self, line: str) -> None:
        """For the person who waits."""


class Steps:
    """The work on a corpus from a mark on. sources, tokenizer: those of the request. settings: what state.json says of
    them. folder: where the files grow."""

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
        write_state(self.folder, self.settings, mark, complete)

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
        if not isinstance(block, Block):
            read = self.before[number + 1]
            return replace(mark, written=writer.written, source=number + 1, place=Place(), read=read)
        try:
            encoded = done.result() if isinstance(done, Future) else done
        except BrokenProcessPool:
            raise ChildProcessError(
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
