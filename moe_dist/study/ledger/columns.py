"""measurements.jsonl as arrays, for whoever reduces many points: Python takes minutes over two million lines of lists.

`write_measurements` puts them into measurements.npz beside it, with a checksum of the lines that they were made of.
Where that does not fit, or there are none, the lines are read. The lines are the record, the arrays a view of it.

Legend: N fractions of the schedule, L layers of one kind (feed_forward, attention), E experts.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from moe_dist.disk import replacing

_SOURCE = "source"


@dataclass(frozen=True)
class Columns:
    """model: by name [N] float64, `fraction` and `step` among them. layers: by kind and name, numbers [N, L] float64,
    counts [N, L, E or places or classes] int64, and `layer` [L]: whose they are. A number that a line has not, or as
    null, is NaN."""

    model: dict[str, np.ndarray]
    layers: dict[str, dict[str, np.ndarray]]

    @staticmethod
    def of(lines: Sequence[dict[str, Any]]) -> "Columns":
        """lines: of measurements.jsonl, in order. Raises ValueError where fractions have unlike layers or lists."""
        of_model = [line for line in lines if line["layer"] is None]
        names = dict.fromkeys(name for line in of_model for name in line if name != "layer")
        model = {name: _numbers(of_model, name) for name in names}
        layers = {}
        for kind in dict.fromkeys(line["kind"] for line in lines if line["layer"] is not None):
            own = [line for line in lines if line.get("kind") == kind]
            numbers = [line["layer"] for line in own if line["step"] == own[0]["step"]]
            if [line["layer"] for line in own] != numbers * len(of_model):
                raise ValueError(f"not every fraction has a line for each of the {kind} layers {numbers}")
            layers[kind] = {"layer": np.array(numbers)} | {
                name: _column(own, name).reshape(len(of_model), len(numbers), *_width(own[0][name]))
                for name in own[0]
                if name not in ("fraction", "step", "layer", "kind")
            }
        return Columns(model, layers)

    def whole(self) -> dict[str, np.ndarray]:
        """Everything by one name each."""
        return {f"model/{name}": array for name, array in self.model.items()} | {
            f"{kind}/{name}": array for kind, arrays in self.layers.items() for name, array in arrays.items()
        }


def save_columns(path: Path, lines: Sequence[dict[str, Any]], data: bytes) -> None:
    """path: of the arrays. data: the bytes of the lines."""
    with replacing(path) as file:
        arrays = {name: _narrow(array) for name, array in Columns.of(lines).whole().items()}
        arrays[_SOURCE] = np.array(_checksum(data))
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_columns(path: Path) -> Columns:
    """Of the measurements.jsonl at `path`. Raises FileNotFoundError, and ValueError where it has lines that are not."""
    data = path.read_bytes()
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            if stored[_SOURCE].tolist() == _checksum(data):
                return _told_apart({name: stored[name] for name in stored.files if name != _SOURCE})
    except Exception:  # zipfile has many for a damaged file
        pass  # a view of the lines, which are read
    return Columns.of(parse_lines(path, data))


def parse_lines(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Raises ValueError that names the line which is not JSON. path: where they come from."""
    lines = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            lines.append(from_json(line))
        except ValueError:
            way_out = f"remove {path}, and its point's line in the ledger: `moe-dist study run` then measures it again"
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}; {way_out}") from None
    return lines


def written_lines(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _told_apart(arrays: dict[str, np.ndarray]) -> Columns:
    model, layers = dict[str, np.ndarray](), dict[str, dict[str, np.ndarray]]()
    for whole, array in arrays.items():
        (kind, _, name), counts = whole.partition("/"), array.dtype.kind in "iu"
        (model if kind == "model" else layers.setdefault(kind, {}))[name] = array.astype(np.int64) if counts else array
    return Columns(model, layers)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Counts in the smallest integers that hold them."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0)))) if array.dtype.kind == "i" else array


def _column(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    if not isinstance(lines[0][name], list):
        return _numbers(lines, name)
    try:
        counts = np.array([line[name] for line in lines], np.int64)
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{name} is not a list of as many numbers in every line") from None
    return counts


def _numbers(lines: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], np.float64)


def _width(value: Any) -> tuple[int, ...]:
    return (len(value),) if isinstance(value, list) else ()


def _checksum(data: bytes) -> list[int]:
    return [len(data), zlib.crc32(data)]
