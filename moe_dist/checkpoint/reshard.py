"""Reading a checkpoint from any layout into any other, and finding the newest one that is whole."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.checkpoint.layout import Manifest
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.store import checkpoints
from moe_dist.engine.base import STATE_KINDS, Engine, logical_shapes
from moe_dist.parallel.objects import broadcast_json, gather_json
from moe_dist.parallel.sharding import logical_parameters

__all__ = ["Reader", "load", "load_weights", "newest_good"]


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint under `root` of which every file is as its manifest says, what is wrong with newer ones).

    (None, []) where there is none at all. Every rank must call: rank 0 lists them, each rank reads a share of the
    files. Raises ValueError on every rank when there are checkpoints and all are damaged.
    """
    listed = broadcast_json([str(folder) for folder in checkpoints(root)] if dist.get_rank() == 0 else None)
    damaged: list[str] = []
    for folder in map(Path, reversed(listed)):
        problems = _problems(folder)
        if not problems:
            return folder, damaged
        damaged += problems
    if damaged:
        raise ValueError(
            "\n".join(damaged) + f"\nall checkpoints under {root} are damaged: restore one, or begin again in another "
            "folder with --resume never and another --run.name"
        )
    return None, []


def load(folder: Path, engine: Engine, checked: bool = False) -> Manifest:
    """Fill `engine` from a checkpoint written under any layout; every rank must call.

    checked: its digests were found right a moment ago. Raises ValueError on every rank when a file is damaged, the
    model has other parameters, or the checkpoint holds weights alone.
    """
    reader = _reader(folder, engine.model, checked)
    if reader.manifest.kinds != list(STATE_KINDS):
        raise ValueError(f"{folder} holds weights alone, no optimizer state: it can generate, but not be continued")
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
    reader = _reader(folder, model, checked=False)
    for name, param, spec in logical_parameters(model):
        values = reader.read("weight", name, spec.flat_start, param.numel())
        param.copy_(values.view_as(param))
    for name, buffer in model.named_buffers():
        buffer.copy_(reader.read("weight", name, 0, buffer.numel()).view_as(buffer))
    return reader.manifest


def _reader(folder: Path, model: nn.Module, checked: bool) -> Reader:
    if not checked and (problems := _problems(folder)):
        raise ValueError("\n".join(problems))
    reader = Reader(folder)
    _check_shapes(reader, model)
    return reader


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank; each reads its share of the files."""
    try:
        mine = Reader(folder).check_digests(dist.get_rank(), dist.get_world_size())
    except ValueError as error:
        mine = [str(error)]
    return list(dict.fromkeys(problem for reply in gather_json(mine) for problem in reply))


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
