"""What a checkpoint says about itself: the manifest.

A checkpoint is a set of safetensors files of contiguous 1-D ranges of logical tensors (fp32 weights and both Adam
moments), and `manifest.json`, which names every range, the SHA-256 and size of every file, and carries a SHA-256 of
itself. Nothing is pickled. A manifest is trusted with nothing: what it says is checked before a byte is read by it.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from moe_dist.engine.base import STATE_KINDS, Kind

FORMAT = 2
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{6,})(\.old(?:-\d+)?)?")
Dtype = Literal["F32", "BF16"]
ITEM_BYTES: dict[Dtype, int] = {"F32": 4, "BF16": 2}

_STRICT = ConfigDict(extra="forbid", strict=True)
_BLANK = "0" * 64
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LARGEST_MANIFEST, _LARGEST_TENSOR = 2**28, 2**44


@dataclass(frozen=True, kw_only=True)
class Range:
    """Elements [start, start + length) of logical tensor `kind/name`, stored under `key` in a file."""

    __pydantic_config__ = _STRICT

    kind: Kind
    name: str
    start: int
    length: int
    dtype: Dtype = "F32"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{self.start}"

    @property
    def bytes(self) -> int:
        return self.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One safetensors file; `size` in bytes."""

    __pydantic_config__ = _STRICT

    file: str
    size: int
    sha256: str
    ranges: list[Range]

    @staticmethod
    def of(values: dict[str, Any]) -> "ShardFile":
        """From `asdict`."""
        return ShardFile(**{**values, "ranges": [Range(**stored) for stored in values["ranges"]]})


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stream is that is a function of (seed, step) alone: `next_step` is the first not yet taken, from 0."""

    __pydantic_config__ = _STRICT

    seed: int
    next_step: int


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run writes into each of its checkpoints.

    run: what it must agree on to be continued. config: all of it, resolved, as plain data. seed: of random numbers;
    data_seed: of data order; null: seed.
    """

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    data_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """step: steps done. skipped: those among them that were left out, which the optimizer has not made. shapes: of
    logical parameters. buffers: those of them that are no parameters but state of routers; frozen: those that were not
    trained. Neither have moments. kinds: what is stored, all of STATE_KINDS or weights alone. data_position and
    random_state: which sequences and which random numbers come next. validation_loss: at this step, where it is known.
    """

    __pydantic_config__ = _STRICT

    step: int
    skipped: int = 0
    validation_loss: float | None = None
    data_position: Position
    random_state: Position
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    kinds: list[Kind]
    shapes: dict[str, list[int]]
    buffers: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    files: list[ShardFile]

    def dumps(self) -> str:
        """Raises ValueError when it would be too large to be read again."""
        text = json.dumps({"format": FORMAT, "sha256": _BLANK, **asdict(self)}, indent=1)
        if len(text) > _LARGEST_MANIFEST:
            raise ValueError(
                f"the manifest of {len(text)} bytes is larger than {_LARGEST_MANIFEST}: save on fewer ranks"
            )
        return text.replace(_BLANK, _digest(text), 1)

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Raises ValueError when the manifest is missing, altered, of another format, or contradicts itself."""
        path = folder / MANIFEST
        try:
            if path.stat().st_size > _LARGEST_MANIFEST:
                raise ValueError(f"it is larger than {_LARGEST_MANIFEST} bytes")
            text = path.read_bytes().decode()
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}: altered, or written by another version of moe_dist")
            said = values.pop("sha256", None)
            if not isinstance(said, str) or _digest(text.replace(said, _BLANK, 1)) != said:
                raise ValueError("it was altered: it does not match its own SHA-256")
            manifest = _ADAPTER.validate_json(json.dumps(values))
            named = STEP_NAME.fullmatch(folder.name)
            if named and int(named[1]) != manifest.step:
                raise ValueError(f"it is of step {manifest.step}, but lies in a folder named {folder.name}")
            for problem in manifest.problems():
                raise ValueError(problem)
            return manifest
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable manifest: {error}") from None

    def tensors(self) -> Iterator[tuple[Kind, str, int]]:
        """(kind, name, elements) of every logical tensor that must be in the files."""
        without = self.without_moments
        for kind in self.kinds:
            for name, shape in self.shapes.items():
                if kind == "weight" or name not in without:
                    yield kind, name, prod(shape)

    @property
    def without_moments(self) -> set[str]:
        return {*self.buffers, *self.frozen}

    def problems(self) -> Iterator[str]:
        """What the manifest contradicts itself in: names, sizes, ranges that overlap or are missing."""
        if not 0 <= self.skipped <= self.step:
            yield f"{self.skipped} of {self.step} steps cannot have been left out"
        for what, at in (("data_position", self.data_position), ("random_state", self.random_state)):
            if at.next_step != self.step:
                yield f"{what} goes on at step {at.next_step} (from 0), but {self.step} steps are done"
        if self.kinds not in (["weight"], list(STATE_KINDS)):
            yield f"kinds={self.kinds} is neither weights alone nor {list(STATE_KINDS)}"
            return
        if unknown := self.without_moments - self.shapes.keys():
            yield f"buffers or frozen parameters {sorted(unknown)} have no shape"
        for name, shape in self.shapes.items():
            if not name.isprintable():  # it will be shown on a terminal
                yield f"{name!r} is no name of a parameter"
            if any(size < 0 for size in shape) or prod(shape) > _LARGEST_TENSOR:
                yield f"{name} has the impossible shape {shape}"
                return
        yield from self._file_problems()
        stored: dict[tuple[Kind, str], list[Range]] = defaultdict(list)
        for shard in self.files:
            for piece in shard.ranges:
                stored[piece.kind, piece.name].append(piece)
        for kind, name, elements in self.tensors():
            yield from _cover(f"{kind}/{name}", sorted(stored.pop((kind, name), []), key=lambda r: r.start), elements)
        if stored:
            yield f"its files hold {'/'.join(next(iter(stored)))}, which is no tensor of this model"

    def _file_problems(self) -> Iterator[str]:
        seen: set[str] = set()
        for shard in self.files:
            if not _PLAIN_NAME.fullmatch(shard.file) or shard.file == MANIFEST or shard.file in seen:
                yield f"file {shard.file!r} is no plain name of its own"
            seen.add(shard.file)
            needed = sum(piece.bytes for piece in shard.ranges)
            if shard.size < needed:
                yield f"{shard.file} of {shard.size} bytes cannot hold its ranges of {needed} bytes"


def _cover(what: str, ranges: list[Range], elements: int) -> Iterator[str]:
    """Nothing when the sorted `ranges` hold each of [0, elements) exactly once; else the first thing wrong."""
    done = 0
    for piece in ranges:
        if piece.length < 1 or piece.start < 0:
            yield f"{what} has a range of {piece.length} elements from {piece.start} on"
            return
        if piece.start < done:
            yield f"elements {piece.start} to {min(done, piece.start + piece.length)} of {what} are stored twice"
            return
        if piece.start > done:
            break
        done += piece.length
    if done > elements:
        yield f"{what} has {elements} elements, but {done} are stored"
    elif done < elements:
        next_start = next((piece.start for piece in ranges if piece.start > done), elements)
        yield f"elements {done} to {next_start} of {what} are in no file"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_ADAPTER = TypeAdapter(Manifest)
