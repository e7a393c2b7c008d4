"""What follows `moe-dist data`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

_ABOUT = """Make texts ready for training.

  moe-dist data tokenizer train texts/ --vocab-size 8000 --output tok
  moe-dist data prepare texts/ --tokenizer tok --output corpora/mine
  moe-dist data inspect corpora/mine

Each has --help. A small corpus needs no preparation: `data.kind: text` with `data.tokenizer: tok` reads it
when a run starts.
"""
_PREPARE = """Tokenise texts into PREFIX.bin and PREFIX.idx, which `data.kind: indexed` and Megatron-core read.

PATH is a file or a folder: text (a document is a file), JSON lines, CSV, Parquet, compressed with gzip, xz, bzip2 or
zstd, or a dataset that Hugging Face `datasets` saved to disk. What a file is, its name says (.jsonl, .csv)
or its first bytes; --kind says it of all.

TOKENIZER is a tokenizer.json, a folder with one, a tiktoken file, a SentencePiece model, or `bytes`. Each document ends
with its end-of-text token. It is copied to PREFIX.tokenizer, and goes with each run that trains on the corpus.

Interrupted, the same command goes on where it was, and the files become the same, byte by byte, with any --workers.
Records without text, with broken JSON or no UTF-8 are counted and named in PREFIX.bad.jsonl; --strict refuses them.
"""
_INSPECT = """Count what is in PREFIX.bin and PREFIX.idx, check it, and show the beginnings of some documents.

Works on any corpus in Megatron's format. --tokenizer is needed where there is no PREFIX.tokenizer.
"""
_LEARN = """Learn a byte-level BPE from texts: tokenizer.json and tokenizer_config.json, which Transformers reads too.

PATH as for `moe-dist data prepare`. Every byte is a token, <|endoftext|> is id 0, then come the most frequent pairs.
"""


def data_arguments(args: Sequence[str]) -> argparse.Namespace:
    """`action` is prepare, inspect or learn."""
    words = list(args)
    match words:
        case ["prepare", *rest]:
            return _prepare(rest)
        case ["inspect", *rest]:
            return _inspect(rest)
        case ["tokenizer", "train", *rest]:
            return _learn(rest)
        case ["tokenizer", *rest] if not {"-h", "--help"} & set(rest):
            raise ValueError("command line: moe-dist data tokenizer knows one thing, train; --help lists what there is")
        case ["tokenizer", *rest]:
            return _learn(rest)
    parser = Parser("moe-dist data", _ABOUT)
    parser.add_argument("action", choices=["prepare", "inspect", "tokenizer"])
    return parser.parse_args(words)


def _prepare(args: list[str]) -> argparse.Namespace:
    parser = Parser("moe-dist data prepare", _PREPARE)
    _add_paths(parser)
    parser.add_argument("--tokenizer", required=True, help="a path, or bytes")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="ends a document; default: as the tokenizer says")
    parser.add_argument("--output", type=user_path, required=True, metavar="PREFIX")
    parser.add_argument("--workers", type=int, help="processes; default: as many as there are cores")
    parser.add_argument("--strict", action="store_true", help="end at the first bad record")
    own = parser.parse_args(args)
    if own.workers is not None and own.workers < 1:
        raise ValueError(f"--workers {own.workers} is below 1")
    own.action = "prepare"
    return own


def _inspect(args: list[str]) -> argparse.Namespace:
    parser = Parser("moe-dist data inspect", _INSPECT)
    parser.add_argument("prefix", metavar="PREFIX", type=user_path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--samples", type=int, default=1, help="documents to show the beginning of")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    own = parser.parse_args(args)
    if own.samples < 0:
        raise ValueError(f"--samples {own.samples} is below 0")
    own.action = "inspect"
    return own


def _learn(args: list[str]) -> argparse.Namespace:
    parser = Parser("moe-dist data tokenizer train", _LEARN)
    _add_paths(parser)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", type=user_path, required=True, metavar="FOLDER")
    own = parser.parse_args(args)
    own.action = "learn"
    return own


def _add_paths(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--kind", choices=["text", "jsonl", "csv", "parquet", "arrow"], help="of all files")
    parser.add_argument("--text-key", default="text", help="where the text of a record is; default: text")
