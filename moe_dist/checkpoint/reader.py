"""Random access to the logical tensors of one checkpoint, whatever ranges they were written in.

Files are opened when first needed and mapped, so memory is what is asked for. Their headers must say what the manifest
says; the manifest itself has been checked when it was read.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.checkpoint.layout import Manifest, Range, ShardFile
from moe_dist.checkpoint.shard import file_digest

_CHUNK = 2**22


class Reader:
    """Raises ValueError when the manifest is damaged or contradicts itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self._files = {shard.file: shard for shard in self.manifest.files}
        self._ranges: dict[tuple[str, str], list[tuple[int, str, Range]]] = defaultdict(list)
        for shard in self.manifest.files:
            for stored in shard.ranges:
                self._ranges[stored.kind, stored.name].append((stored.start, shard.file, stored))
        for ranges in self._ranges.values():
            ranges.sort(key=lambda entry: entry[0])
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Elements [start, start + length) of a logical tensor, 1-D. Raises ValueError when any is missing, or when a
        file is not what the manifest says."""
        ranges = self._ranges.get((kind, name), [])
        out, done = torch.empty(length, dtype=dtype), 0
        index = max(0, bisect.bisect_right([entry[0] for entry in ranges], start) - 1)
        for first, file, stored in ranges[index:]:
            at = start + done
            if done == length or not first <= at < first + stored.length:
                break
            take = min(first + stored.length - at, length - done)
            out[done : done + take] = self._slice(file, stored.key, at - first, take)
            done += take
        if done < length:
            missing = f"elements {start + done} to {start + length} of {kind}/{name}"
            raise ValueError(f"{self.folder}: {missing} are in no file of the checkpoint")
        return out

    def stream(
        self, kind: str, name: str, start: int, length: int, dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        """The same in pieces of bounded size."""
        for first in range(start, start + length, _CHUNK):
            yield self.read(kind, name, first, min(_CHUNK, start + length - first), dtype)

    def dtypes(self, kind: str, name: str) -> list[str]:
        """How a logical tensor is stored."""
        return sorted({stored.dtype for _, _, stored in self._ranges.get((kind, name), [])})

    def check_digests(self, rank: int, world: int) -> list[str]:
        """Problems of this rank's share of the files: missing, of another size, altered, or not as the manifest says.

        Each opens with the path of the file.
        """
        problems = []
        for shard in self.manifest.files[rank::world]:
            path = self.folder / shard.file
            try:
                if not path.is_file():
                    problems.append(f"{path} is missing")
                elif path.stat().st_size != shard.size:
                    problems.append(f"{path} has {path.stat().st_size} bytes, not the {shard.size} of the manifest")
                elif file_digest(path) != shard.sha256:
                    problems.append(f"{path} does not match its SHA-256 in the manifest")
                else:
                    self._opened(shard.file)
            except OSError as error:
                problems.append(f"{path} cannot be read: {error}")
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _slice(self, file: str, key: str, start: int, length: int) -> Tensor:
        try:
            return self._opened(file).get_slice(key)[start : start + length]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder / file}: cannot be read: {error}") from None

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._checked(self._files[file])
        return self._open[file]

    def _checked(self, shard: ShardFile) -> Any:
        """The file, once its header says what the manifest says. The library has seen to it that the header's tensors
        lie within the file and do not overlap."""
        path = self.folder / shard.file
        try:
            opened = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        stored = {piece.key: piece for piece in shard.ranges}
        if odd := stored.keys() ^ set(opened.keys()):
            key = min(odd)
            where = "the manifest, but not in the file" if key in stored else "the file, but not in the manifest"
            raise ValueError(f"{path}: {key} is in {where}")
        for key, piece in stored.items():
            found = opened.get_slice(key)
            if (found.get_dtype(), found.get_shape()) != (piece.dtype, [piece.length]):
                raise ValueError(
                    f"{path}: {key} is {found.get_dtype()} {found.get_shape()} in the file, "
                    f"but {piece.dtype} [{piece.length}] in the manifest"
                )
        return opened
