"""Which files a corpus is prepared from, and of which kind they are.

| kind | told by | a document is | is named by |
|---|---|---|---|
| jsonl | .jsonl, .ndjson, .json | a record | its line |
| csv | .csv | a record | its line |
| parquet | the file's first bytes | a row | its row, from 1 |
| arrow | the data files of a dataset that Hugging Face `datasets` saved | a row | its row, from 1 |
| text | anything else | the file | the file |

A suffix of compression before it, such as .jsonl.zst, changes nothing; how a file is compressed its contents say.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from moe_dist.config.values import user_path
from moe_dist.data.documents import UNREADABLE, LeftOut, open_text, walk

Kind = Literal["text", "jsonl", "csv", "parquet", "arrow"]
KINDS: tuple[Kind, ...] = ("text", "jsonl", "csv", "parquet", "arrow")
_SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
_COMPRESSED = re.compile(r"\.(gz|zst|zstd|xz|bz2)$")


@dataclass(frozen=True)
class Source:
    """A file to read. size, changed: as they were when it was found; the latter in nanoseconds."""

    path: str
    kind: Kind
    size: int
    changed: int

    def record(self) -> dict[str, Any]:
        return asdict(self)


def find_sources(paths: list[str], kind: Kind | None, left_out: LeftOut) -> list[Source]:
    """Files in the order given, those of a folder in the order of their paths. kind: of all of them; None: as told.

    What a folder holds besides texts goes to left_out. Raises ValueError when a path is missing or has no text.
    """
    found: list[Source] = []
    for path in map(user_path, paths):
        try:
            if path.is_file():
                found.append(_source(path, kind))
            elif path.is_dir():
                found += _dataset(path) if (path / "dataset_info.json").is_file() else _folder(path, kind, left_out)
            else:
                raise ValueError(f"{path} is neither a file nor a folder (looked from {Path.cwd()})")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{', '.join(paths)} holds no text ({left_out.describe() or 'no files'})")
    return found


def _folder(folder: Path, kind: Kind | None, left_out: LeftOut) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        raise ValueError(f"{folder} is a dataset in several splits: name one of them, {folder}/NAME of {splits}")
    found = []
    for _, path in walk(folder, left_out=left_out):
        try:
            found.append(_source(path, kind))
        except ValueError as error:
            left_out.add(str(error).removeprefix(f"{path} is ").partition(":")[0], str(path))
    return found


def _source(path: Path, kind: Kind | None) -> Source:
    with path.open("rb") as file:
        if kind is None and file.read(4) == b"PAR1":
            kind = "parquet"
        kind = kind or _SUFFIXES.get(Path(_COMPRESSED.sub("", path.name)).suffix.lower(), "text")
        file.seek(0)
        if kind in ("text", "jsonl", "csv") and (reason := _no_text(file)):
            raise ValueError(f"{path} is {reason}: give text, or its kind")
    status = path.stat()
    return Source(str(path), kind, status.st_size, status.st_mtime_ns)


def _no_text(file: IO[bytes]) -> str | None:
    """Why it is no text. A packed file that is damaged counts as text: reading it makes a bad record."""
    try:
        return open_text(file)[1]
    except UNREADABLE:
        return None


def _dataset(folder: Path) -> list[Source]:
    """What `datasets.Dataset.save_to_disk` wrote: state.json names the files, in order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/state.json does not tell the files of a saved dataset: {error!r}") from None
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} was saved with indices, by an old version: save it anew, flatten_indices() first")
    return [_source(folder / name, "arrow") for name in names]
