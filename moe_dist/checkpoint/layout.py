"""What a checkpoint says about itself: the manifest.

A checkpoint is a set of safetensors files, one a rank, of contiguous 1-D ranges of logical tensors (fp32 weights and
both Adam moments), and `manifest.json`, which names every range and the SHA-256 of every file. Nothing is pickled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

FORMAT = 1
_STRICT = ConfigDict(extra="forbid", strict=True)
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Elements [start, start + length) of logical tensor `kind/name`, stored under `key` in a file."""

    __pydantic_config__ = _STRICT

    kind: str
    name: str
    start: int
    length: int

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}/{self.start}"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One rank's file."""

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
class Manifest:
    """step: optimizer steps done. shapes: logical parameters. run: what the run must agree on to be continued."""

    __pydantic_config__ = _STRICT

    step: int
    shapes: dict[str, list[int]]
    files: list[ShardFile]
    run: dict[str, Any] = field(default_factory=dict)

    def dumps(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Raises ValueError when the manifest is missing, is not JSON, or is of another format."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
            if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return _ADAPTER.validate_json(json.dumps(raw))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable manifest: {error}") from None


_ADAPTER = TypeAdapter(Manifest)
