"""`moe-dist data inspect`: what is in an indexed corpus, of ours or of Megatron's own tools."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.indexed import Index, check_index, document_starts
from moe_dist.data.prepare.job import digest_of
from moe_dist.data.prepared import read_record
from moe_dist.data.tokenizer import Tokenizer

_CHUNK = 1 << 20
_SHOWN_TOKENS = 200


def inspect_corpus(prefix: str, tokenizer: Tokenizer | None, samples: int) -> dict[str, Any]:
    """Counts, lengths of documents in tokens, digests, and the beginnings of `samples` documents, evenly spread.

    Reads both files. Raises ValueError when they are no indexed corpus, not what PREFIX.json says, or hold ids that the
    tokenizer does not have.
    """
    index, idx_digest = check_index(prefix)
    lengths = np.concatenate([np.diff(starts) for starts in document_starts(index)])
    digests = {"bin": digest_of(Path(f"{prefix}.bin")), "idx": idx_digest.hex()}
    told = read_record(prefix)
    if told and told["digest"] != digests:
        wrong = " and ".join(f"{prefix}.{end}" for end in digests if told["digest"][end] != digests[end])
        raise ValueError(f"{wrong} changed since {prefix}.json was written: prepare the corpus anew")
    largest, counted = _largest(index), tokenizer.vocab_size if tokenizer else None
    if counted is not None and largest >= counted:
        raise ValueError(f"{prefix}.bin holds the id {largest}, but its tokenizer has {counted} ids: it is another one")
    quantiles = np.quantile(lengths, [0, 0.05, 0.5, 0.95, 1], method="lower").tolist()
    numbers = np.unique(np.linspace(0, index.documents - 1, samples).astype(np.int64)).tolist() if samples else []
    return {
        "prefix": prefix,
        "documents": index.documents,
        "tokens": index.tokens,
        "dtype": index.dtype.name,
        "largest_id": largest,
        "lengths": dict(zip(("least", "5%", "median", "95%", "most"), quantiles, strict=True))
        | {"mean": index.tokens / index.documents},
        "tokenizer": None if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids",
        "digest": digests,
        "bad": sum(told["bad"].values()) if told else None,
        "samples": {number: _sample(index, number, tokenizer) for number in numbers},
    }


def describe(found: dict[str, Any]) -> str:
    """For a person."""
    lengths = found["lengths"]
    shown = ", ".join(f"{name} {lengths[name]:,}" for name in ("least", "5%", "median", "95%", "most"))
    rows = {
        "documents": f"{found['documents']:,}",
        "tokens": f"{found['tokens']:,} as {found['dtype']}, the largest id is {found['largest_id']:,}",
        "lengths": f"{shown}; mean {lengths['mean']:,.1f}",
        "tokenizer": found["tokenizer"] or "not told: name it with --tokenizer to see text",
        "bad records": "not told" if found["bad"] is None else f"{found['bad']:,}",
        "SHA-256 of .bin": found["digest"]["bin"],
        "SHA-256 of .idx": found["digest"]["idx"],
    }
    lines = [found["prefix"], *(f"  {name:<16} {value}" for name, value in rows.items())]
    lines += [f"--- document {number}\n{text}" for number, text in found["samples"].items()]
    return "\n".join(lines)


def _largest(index: Index) -> int:
    largest = -1
    with Path(f"{index.prefix}.bin").open("rb") as file:
        while data := file.read(_CHUNK * index.dtype.itemsize):
            largest = max(largest, int(np.frombuffer(data, index.dtype).max()))
    return largest


def _sample(index: Index, document: int, tokenizer: Tokenizer | None) -> str:
    with Path(f"{index.prefix}.idx").open("rb") as file:
        start, end = index.document_start(file, document), index.document_start(file, document + 1)
    count = min(end - start, _SHOWN_TOKENS)
    with Path(f"{index.prefix}.bin").open("rb") as file:
        file.seek(start * index.dtype.itemsize)
        ids = np.frombuffer(file.read(count * index.dtype.itemsize), index.dtype)
    more = f" ... ({end - start:,} tokens)" if end - start > count else ""
    return (" ".join(map(str, ids.tolist())) if tokenizer is None else tokenizer.decode(ids.tolist())) + more
