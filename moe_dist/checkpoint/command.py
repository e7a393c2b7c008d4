"""`moe-dist checkpoint`: look into checkpoints, verify, convert and compare them, on one process."""

import argparse
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.convert import convert
from moe_dist.checkpoint.diff import Difference, differences
from moe_dist.checkpoint.find import all_checkpoints, whole_checkpoint
from moe_dist.checkpoint.layout import Dtype
from moe_dist.checkpoint.reader import Reader

_DTYPES: dict[str, Dtype] = {"fp32": "F32", "bf16": "BF16"}  # the names of arguments.py
_HIGHLIGHTS = (
    "model.d_model model.num_layers model.num_heads model.num_kv_heads model.moe.num_experts model.moe.top_k "
    "model.moe.capacity_factor parallel.ep parallel.tp engine.name engine.zero_stage engine.precision optim.lr "
    "train.steps train.seq_len train.global_batch train.seed train.data_seed"
)


def checkpoint(own: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 1 when verify finds damage or diff a difference. Raises ValueError for what a user
    got wrong, and for a damaged checkpoint that was to be read."""
    match own.command:
        case "inspect":
            print("\n".join(describe(Reader(all_checkpoints(own.path)[-1]))))
            return 0
        case "verify":
            return _verify(all_checkpoints(own.path))
        case "convert":
            source = whole_checkpoint(own.path, _warn)
            convert(source, own.target, _DTYPES.get(own.dtype), own.files, own.weights_only)
            print(f"{source} written to {own.target}")
            return 0
    return _diff(*(Reader(whole_checkpoint(path, _warn)) for path in (own.path, own.other)))


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def describe(reader: Reader) -> Iterator[str]:
    """Lines for a person: step, parameters, files, configuration."""
    manifest, buffers, frozen = reader.manifest, set(reader.manifest.buffers), set(reader.manifest.frozen)
    parameters = [prod(shape) for name, shape in manifest.shapes.items() if name not in buffers]
    size = sum(shard.size for shard in manifest.files)
    loss = "" if manifest.validation_loss is None else f", validation loss {manifest.validation_loss:.4f}"
    yield f"checkpoint  {reader.folder}: step {manifest.step}{loss}"
    yield f"holds       {', '.join(manifest.kinds)}; {size:,} bytes in {len(manifest.files)} files"
    yield f"parameters  {sum(parameters):,} in {len(parameters)} tensors"
    position = manifest.data_position
    yield f"data        seed {position.seed}, next step {position.next_step} (counted from 0)"
    values = [f"{key}={_value(manifest.config, key)}" for key in _HIGHLIGHTS.split() if manifest.config]
    yield f"config      {' '.join(values) or 'none recorded'}"
    width = max(map(len, manifest.shapes), default=0)
    for name, shape in manifest.shapes.items():
        stored = [
            f"{kind} {'/'.join(reader.dtypes(kind, name))}" for kind in manifest.kinds if reader.dtypes(kind, name)
        ]
        note = "  (no parameter: router state)" if name in buffers else "  (frozen)" if name in frozen else ""
        yield f"  {name:{width}}  {shape}  {', '.join(stored)}{note}"
    for shard in manifest.files:
        yield f"  {shard.file}  {shard.size:,} bytes  {len(shard.ranges)} ranges  sha256 {shard.sha256}"


def _value(config: dict[str, Any], key: str) -> Any:
    at: Any = config
    for part in key.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return at if isinstance(at, int | float | None) or str(at).isprintable() else repr(at)  # it is for a terminal


def _verify(folders: list[Path]) -> int:
    code = 0
    for folder in folders:
        try:
            reader = Reader(folder)
            problems = reader.check_digests(0, 1)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            code = 1
            print("\n".join(problems))
        else:
            size = sum(shard.size for shard in reader.manifest.files)
            print(f"{folder} is whole: step {reader.manifest.step}, {len(reader.manifest.files)} files, {size:,} bytes")
    return code


def _diff(first: Reader, second: Reader) -> int:
    steps = first.manifest.step, second.manifest.step
    if steps[0] != steps[1]:
        print(f"steps {steps[0]} and {steps[1]}")
    if first.manifest.kinds != second.manifest.kinds:
        print("one holds weights alone: moments are not compared")
    found = list(differences(first, second))
    other = [difference for difference in found if not difference.equal]
    for difference in other:
        print(_line(difference))
    print(f"{len(found) - len(other)} of {len(found)} parameters are equal")
    return 1 if other else 0


def _line(difference: Difference) -> str:
    values = ", ".join(f"{kind} {largest:.3g}" for kind, largest in difference.largest.items())
    return f"{difference.name}: {difference.note or 'largest difference ' + values}"
