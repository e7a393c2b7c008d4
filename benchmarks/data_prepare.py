"""`moe-dist data prepare` beside Megatron's way: the same JSON lines, tokenizer and number of processes.

    python benchmarks/data_prepare.py --mib 200 --workers 2

Megatron's way is that of its tools/preprocess_data.py: a pool that maps over lines, 32 at a time, and the builder of
megatron-core, which takes a document at a time. Each side runs in a process of its own; told are seconds of wall clock,
the peak memory of that process and that of its largest worker. Runs alternate, `--times` each.
"""

import argparse
import importlib
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from moe_dist.data.command import Watch
from moe_dist.data.prepare.job import prepare
from moe_dist.data.prepare.learn import learn_tokenizer
from moe_dist.data.prepare.steps import Request

SYLLABLES = "ka lo mi ten sur da ve po ris na qu el or am it be".split()
_LINES_AT_ONCE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/moe-dist-prepare"))
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--side", choices=["ours", "megatron"], help="one run of one side, by itself")
    own = parser.parse_args()
    source, tok = own.folder / f"{own.mib}.jsonl", own.folder / f"tok-{own.vocab_size}"
    if own.side is not None:
        run(own.side, source, tok, own.folder, own.workers)
        return
    own.folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        write(source, own.mib)
    if not tok.exists():
        write(own.folder / "small.jsonl", 4)
        learn_tokenizer([str(own.folder / "small.jsonl")], tok, own.vocab_size, None, "text", print)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "megatron": []}
    for _ in range(own.times):
        for side in found:
            done = subprocess.run([sys.executable, *sys.argv, "--side", side], stdout=subprocess.PIPE, check=True)
            found[side].append(json.loads(done.stdout))
    for side, runs in found.items():
        seconds = [each["seconds"] for each in runs]
        shown = ", ".join(f"{each:.1f}" for each in seconds)
        print(
            f"{side:<9} {own.mib / median(seconds):6.2f} MiB/s  ({shown} s), memory {runs[-1]['mib']:.0f} MiB, "
            f"workers {runs[-1]['worker_mib']:.0f} MiB"
        )
    for end in ("bin", "idx"):
        assert (own.folder / f"ours.{end}").read_bytes() == (own.folder / f"megatron.{end}").read_bytes()
    print("the files are the same, byte by byte")


def run(side: str, source: Path, tok: Path, folder: Path, workers: int) -> None:
    """Prints seconds and MiB as JSON."""
    for old in folder.glob(f"{side}.*"):
        if old.is_file():
            old.unlink()
    if side == "megatron":
        importlib.import_module("megatron.core.datasets.indexed_dataset")  # takes seconds, and is no work
    began = time.perf_counter()
    if side == "ours":
        prepare(Request([str(source)], folder / "ours", str(tok), workers=workers), Watch(Console(stderr=True)))
    else:
        megatron(source, tok, folder / "megatron", workers)
    seconds = time.perf_counter() - began
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "mib": peaks[0], "worker_mib": peaks[1]}))


_state: dict[str, Any] = {}  # of a worker of Megatron's way


def _start(tok: str) -> None:
    from tokenizers import Tokenizer

    _state["tokenizer"] = Tokenizer.from_file(f"{tok}/tokenizer.json")


def _encode(line: str) -> list[int]:
    ids: list[int] = _state["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, 0]


def megatron(source: Path, tok: Path, prefix: Path, workers: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    size = Tokenizer.from_file(f"{tok}/tokenizer.json").get_vocab_size()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(size))
    with multiprocessing.Pool(workers, _start, (str(tok),)) as pool, source.open(encoding="utf-8") as lines:
        for ids in pool.imap(_encode, lines, _LINES_AT_ONCE):
            builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def write(path: Path, mib: int) -> None:
    """Made-up words, as often as Zipf says, in documents of 20 to 600."""
    rng, size = random.Random(0), 0
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        for line in _records(rng, words, weights):
            file.write(line)
            size += len(line)
            if size >= mib << 20:
                return


def _records(rng: random.Random, words: list[str], weights: list[float]) -> Iterator[str]:
    while True:
        drawn = rng.choices(words, weights, k=rng.randint(20, 600))
        yield json.dumps({"text": " ".join(drawn).capitalize() + ".\n"}) + "\n"


if __name__ == "__main__":
    main()
