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
    parser = Parser("moe-dist data", _ABOUT)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{prepare,inspect,tokenizer}")
    _add_prepare(actions.add_parser("prepare", prog="moe-dist data prepare", about=_PREPARE, help="texts to a corpus"))
    _add_inspect(actions.add_parser("inspect", prog="moe-dist data inspect", about=_INSPECT, help="look into one"))
    learn = "Make a tokenizer of your own texts."
    tokenizer = actions.add_parser("tokenizer", prog="moe-dist data tokenizer", about=learn, help="learn a tokenizer")
    tools = tokenizer.add_subparsers(dest="tool", required=True, metavar="{train}")
    _add_learn(tools.add_parser("train", prog="moe-dist data tokenizer train", about=_LEARN, help="byte-level BPE"))
    own = parser.parse_args(list(args))
    own.action = "learn" if own.action == "tokenizer" else own.action
    for name, low in (("workers", 1), ("samples", 0)):
        value = getattr(own, name, None)
        if value is not None and value < low:
            raise ValueError(f"--{name} {value} is below {low}")
    return own


def _add_prepare(parser: Parser) -> None:
    _add_paths(parser)
    parser.add_argument("--tokenizer", required=True, help="path of one, as above, or bytes")
    parser.add_argument("--end-of-text", metavar="TOKEN", help="ends a document (default: what the tokenizer says)")
    parser.add_argument("--output", type=user_path, required=True, metavar="PREFIX", help="the new files, without .bin")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: as many as there are cores)")
    parser.add_argument("--strict", action="store_true", help="end at the first bad record")


def _add_inspect(parser: Parser) -> None:
    parser.add_argument("prefix", metavar="PREFIX", type=user_path, help="path of the files, without .bin and .idx")
    parser.add_argument("--tokenizer", help="path of one, or bytes (default: PREFIX.tokenizer)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="documents to show the beginning of")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def _add_learn(parser: Parser) -> None:
    _add_paths(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens to have, bytes included")
    parser.add_argument("--output", type=user_path, required=True, metavar="FOLDER", help="of the new tokenizer")


def _add_paths(parser: Parser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and folders of texts")
    kind = "of all files (default: what the name or the first bytes of each say)"
    parser.add_argument("--kind", choices=["text", "jsonl", "csv", "parquet", "arrow"], help=kind)
    parser.add_argument("--text-key", default="text", metavar="KEY", help="where the text of a record is")
