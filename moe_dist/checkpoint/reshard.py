"""Reading a checkpoint from any layout into any other: ranges in, ranges out."""

import bisect
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_dist.checkpoint.layout import Manifest, Range
from moe_dist.checkpoint.store import file_digest
from moe_dist.engine.base import STATE_KINDS, Engine, logical_shapes
from moe_dist.parallel.objects import gather_json
from moe_dist.parallel.sharding import logical_parameters


class Reader:
    """Random access to the logical tensors of one checkpoint. Files are opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self._ranges: dict[tuple[str, str], list[tuple[int, str, Range]]] = defaultdict(list)
        for shard in self.manifest.files:
            for stored in shard.ranges:
                self._ranges[stored.kind, stored.name].append((stored.start, shard.file, stored))
        for ranges in self._ranges.values():
            ranges.sort(key=lambda entry: entry[0])
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a logical tensor, 1-D. Raises ValueError when any is missing."""
        ranges = self._ranges.get((kind, name), [])
        out, done = torch.empty(length), 0
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

    def _slice(self, file: str, key: str, start: int, length: int) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(key)[start : start + length]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder / file}: cannot be read: {error}") from None

    def check_digests(self, rank: int, world: int) -> list[str]:
        """Problems of this rank's share of the files: missing, of another size, or altered."""
        problems = []
        for shard in self.manifest.files[rank::world]:
            path = self.folder / shard.file
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != shard.size or file_digest(path) != shard.sha256:
                problems.append(f"{path} does not match its SHA-256 in the manifest")
        return problems


def load(folder: Path, engine: Engine) -> Manifest:
    """Fill `engine` from a checkpoint written under any layout; every rank must call.

    Raises ValueError on every rank when a file is damaged or the model has other parameters.
    """
    reader = _checked(folder, engine.model)
    for kind in STATE_KINDS:
        for piece in engine.held(kind):
            values = reader.read(kind, piece.name, piece.start, piece.values.numel())
            with torch.no_grad():
                piece.values.copy_(values)
    engine.restore(reader.manifest.step)
    return reader.manifest


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> Manifest:
    """Fill a model that no engine owns, on one rank of any layout and in any precision; otherwise as `load`."""
    reader = _checked(folder, model)
    for name, param, spec in logical_parameters(model):
        values = reader.read("weight", name, spec.flat_start, param.numel())
        param.copy_(values.view_as(param))
    for name, buffer in model.named_buffers():
        buffer.copy_(reader.read("weight", name, 0, buffer.numel()).view_as(buffer))
    return reader.manifest


def _checked(folder: Path, model: nn.Module) -> Reader:
    reader = Reader(folder)
    replies = gather_json(reader.check_digests(dist.get_rank(), dist.get_world_size()))
    problems = [problem for reply in replies for problem in reply]
    if problems:
        raise ValueError("\n".join(problems))
    _check_shapes(reader, model)
    return reader


def _check_shapes(reader: Reader, model: nn.Module) -> None:
    """By the whole model, not by what this rank holds of it: under ZeRO some ranks hold nothing of what is wrong."""
    needed = logical_shapes(model)
    stored = reader.manifest.shapes
    for name in sorted(needed.keys() | stored.keys()):
        if stored.get(name) != needed.get(name):
            raise ValueError(
                f"{reader.folder}: parameter {name} {_shape(stored.get(name))} here, but {_shape(needed.get(name))} "
                f"in this model: load it with its own config"
            )


def _shape(shape: list[int] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"
