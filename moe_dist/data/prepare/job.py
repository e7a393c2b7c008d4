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

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from moe_dist.data.documents import LeftOut
from moe_dist.data.index_writer import dtype_of, write_index
from moe_dist.data.prepare.mark import Mark, read_state
from moe_dist.data.prepare.sources import Source, find_sources
from moe_dist.data.prepare.steps import Request, Steps, Watcher
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.data.tokenizers import load_tokenizer, save_tokenizer
from moe_dist.disk import flush, locked, replace_text

FORMAT = 1
_SHOWN = 3


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
        mark, complete = read_state(folder, settings)
        if mark.read:
            watcher.say(f"going on with {folder}: {mark.written.documents} documents are there")
        if not complete:
            mark = Steps(request, tokenizer, sources, settings, folder, watcher).run(mark)
        return _publish(request.prefix, folder, tokenizer, settings, mark, left_out)


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
