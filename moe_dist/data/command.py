"""`moe-dist data`: prepare and inspect corpora, learn tokenizers."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from moe_dist.config.values import index_prefix
from moe_dist.data.prepare.inspect import describe, inspect_corpus
from moe_dist.data.prepare.job import prepare, summary_of
from moe_dist.data.prepare.learn import learn_tokenizer
from moe_dist.data.prepare.mark import Mark
from moe_dist.data.prepare.steps import Request
from moe_dist.data.prepared import tokenizer_beside
from moe_dist.data.tokenizers import load_tokenizer

_EVERY = 10.0  # seconds between lines where there is no terminal


def data(own: argparse.Namespace) -> int:
    """own: of data_arguments. Returns the exit code. Raises ValueError for what a user got wrong."""
    match own.action:
        case "prepare":
            return _prepare(own)
        case "inspect":
            return _inspect(own)
        case _:
            size = learn_tokenizer(own.paths, own.output, own.vocab_size, own.kind, own.text_key, _say)
            fewer = f", of {own.vocab_size} that were asked for" if size < own.vocab_size else ""
            print(f"{own.output} holds a tokenizer of {size} ids{fewer}")
            return 0


class Watch:
    """On a terminal a bar, elsewhere a line every ten seconds. All of it on standard error."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()
        columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_interactive else None
        self._began, self._at, self._total = Mark(), time.monotonic(), 0

    def begin(self, total: int, mark: Mark) -> None:
        self._began, self._at, self._total = mark, time.monotonic(), max(total, 1)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total, completed=mark.read)
            self._bar.start()

    def step(self, mark: Mark) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=mark.read, description=self._line(mark))
        elif time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            self.say(f"{mark.read / self._total:.0%}  {self._line(mark)}")

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, mark: Mark) -> str:
        bad = f", {sum(mark.bad.values()):,} bad" if mark.bad else ""
        rate = (mark.written.tokens - self._began.written.tokens) / max(time.monotonic() - self._at, 1e-3)
        return f"{mark.written.documents:,} documents, {mark.written.tokens:,} tokens{bad}, {rate:,.0f} tokens/s"


def _prepare(own: argparse.Namespace) -> int:
    prefix = Path(index_prefix(str(own.output)))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    workers = own.workers or len(os.sched_getaffinity(0))
    request = Request(
        own.paths, prefix, own.tokenizer, own.end_of_text, own.text_key, own.kind, workers, strict=own.strict
    )
    watch = Watch(Console(stderr=True))
    try:
        record = prepare(request, watch)
    finally:
        watch.end()
    print(f"{prefix}: {summary_of(record)}")
    if record["bad"]:
        print(f"{prefix}.bad.jsonl names each of them")
    print(f"train on it with: data: {{kind: indexed, paths: [{prefix}]}}")
    return 0


def _inspect(own: argparse.Namespace) -> int:
    prefix = index_prefix(str(own.prefix))
    tokenizer = load_tokenizer(own.tokenizer) if own.tokenizer else tokenizer_beside(prefix)
    found = inspect_corpus(prefix, tokenizer, own.samples)
    print(json.dumps(found, indent=1, ensure_ascii=False) if own.json else describe(found))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
