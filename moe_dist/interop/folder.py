"""A Hugging Face folder on disk: config.json, weights in one or several safetensors files, tokenizer files.

Weights are read tensor by tensor, of a tensor for all experts one expert at a time, and written in a stream.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint.shard import FILE_DTYPE, Stored, write_tensors
from moe_dist.disk import write_durably
from moe_dist.interop.names import Place

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
SMALL_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
"""What a folder holds beside weights."""
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # older versions saved what the configuration says


class Weights:
    """The tensors of a folder. Raises ValueError when a file is missing or unreadable, or they contradict the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in self._files():
            names: list[str] = self._opened(file).keys()
            for name in names:
                if name in self._file_of:
                    raise ValueError(f"{folder}: {name} is in {self._file_of[name]} and in {file}")
                self._file_of[name] = file
        if (folder / INDEX).is_file():
            listed = _weight_map(folder)
            for name in sorted(listed.keys() ^ self._file_of.keys()):
                where = f"{INDEX}, but in no file" if name in listed else f"{self._file_of[name]}, but not in {INDEX}"
                raise ValueError(f"{folder}: {name} is in {where}")

    def names(self) -> list[str]:
        return [name for name in self._file_of if not _COMPUTED.fullmatch(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, ..."""
        dtype: str = self._slice(name).get_dtype()
        return dtype

    def read(self, place: Place) -> Tensor:
        if place.expert is not None:
            part: Tensor = self._slice(place.name)[place.expert]
            return part
        whole: Tensor = self._opened(self._file_of[place.name]).get_tensor(place.name)
        return whole

    def _files(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            files = sorted(set(_weight_map(self.folder).values()))
            for file in files:
                if not (self.folder / file).is_file():
                    raise ValueError(f"{self.folder / file} is missing, which {INDEX} names: download it again")
            return files
        if (self.folder / _ONE_FILE).is_file():
            return [_ONE_FILE]
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            pickled = next(self.folder.glob("*.bin"), None)
            way = "" if pickled is None else f"; {pickled.name} is pickled: load it with Transformers and save it anew"
            raise ValueError(f"{self.folder} holds no weights in safetensors files{way}")
        return files

    def _slice(self, name: str) -> Any:
        return self._opened(self._file_of[name]).get_slice(name)

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / file}: cannot be read: {error}") from None
        return self._open[file]


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index says. Raises ValueError when it does not."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{folder / INDEX}: weight_map does not name a file for each tensor: download it again")
    return listed


def write_weights(folder: Path, tensors: list[Stored], most_bytes: int) -> int:
    """In files of at most `most_bytes`, but for tensors that are larger, with an index where there are several files.
    Returns how many files."""
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _ONE_FILE
        aligned = sorted(shard, key=lambda tensor: -FILE_DTYPE[tensor.dtype].itemsize)
        write_tensors(folder / file, aligned, {"format": "pt"})
        where |= {tensor.key: file for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": where}
        write_json(folder / INDEX, index)
    return len(shards)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when it is no JSON object, or not there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def small_files(folder: Path) -> Iterator[Path]:
    """Those of SMALL_FILES that are there."""
    return (folder / name for name in SMALL_FILES if (folder / name).is_file())
