"""Reading a checkpoint from any layout into any other, and finding the newest one that is whole."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moe_dist.checkpoint.layout import Manifest
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.store import checkpoints
from moe_dist.engine.base import STATE_KINDS, Engine, logical_shapes
from moe_dist.parallel.objects import broadcast_json, gather_json, rank_and_world
from moe_dist.parallel.sharding import logical_parameters

__all__ = [
    "Reader",
    "begin_with",
    "load",
    "load_weights",
    "newest_good",
    "newest_told",
    "other_parameters",
    "refuse_other_parameters",
    "require_whole",
]


def newest_good(root: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint under `root` of which every file is as its manifest says, what is wrong with newer ones).

    (None, []) where there is none at all. Every rank must call: rank 0 lists them, each rank reads a share of the
    files. Raises ValueError on every rank when there are checkpoints and all are damaged, or `root` cannot be listed.
    """
    listed, refusal = broadcast_json(_list(root) if rank_and_world()[0] == 0 else None)
    if refusal is not None:
        raise ValueError(refusal)
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


def newest_told(root: Path, say: Callable[[str], None]) -> Path | None:
    """As `newest_good`; `say` takes a line on what is wrong with newer ones."""
    newest, damaged = newest_good(root)
    for problem in damaged:
        say(f"passed over: {problem}")
    return newest


def load(
    folder: Path, engine: Engine, checked: bool = False, pass_over: Callable[[str], None] | None = None
) -> Manifest:
    """Fill `engine` from a checkpoint written under any layout; every rank must call.

    checked: its digests were found right a moment ago. pass_over: takes a line on each parameter that is absent here or
    has another shape; it stays as it was. Raises ValueError on every rank when a file is damaged, the checkpoint holds
    weights alone, or the model has other parameters and there is no pass_over. Moments of what was frozen there, and is
    not here, are zero.
    """
    reader = _reader(folder, checked)
    others = other_parameters(reader.manifest, engine.model)
    for problem in others.values():
        if pass_over is None:
            raise ValueError(f"{folder}: {problem}: load it with its own config")
        pass_over(f"not loaded: {problem}")
    if reader.manifest.kinds != list(STATE_KINDS):
        raise ValueError(f"{folder} holds weights alone, no optimizer state: it can generate, but not be continued")
    for kind in STATE_KINDS:
        for piece in engine.held(kind):
            if piece.name in others:
                continue
            engine.mesh.trail.enter("loading of a checkpoint")
            with torch.no_grad():
                if kind != "weight" and piece.name in reader.manifest.frozen:
                    piece.values.zero_()
                else:
                    piece.values.copy_(reader.read(kind, piece.name, piece.start, piece.values.numel()))
    engine.restore(reader.manifest.step - reader.manifest.skipped)
    return reader.manifest


@torch.no_grad()
def begin_with(folder: Path, engine: Engine) -> None:
    """Fill `engine` with the weights alone of a checkpoint, whose digests have been found right: no step is made. State
    of routers that is absent there stays as it was. Every rank must call."""
    reader = Reader(folder)
    for piece in engine.held("weight"):
        engine.mesh.trail.enter("loading of a checkpoint")
        if piece.name in reader.manifest.shapes:
            piece.values.copy_(reader.read("weight", piece.name, piece.start, piece.values.numel()))
    engine.restore(0)


def refuse_other_parameters(folder: Path, model: nn.Module) -> None:
    """Raises ValueError where a run with `model` cannot be continued from a checkpoint. Reads its manifest alone."""
    for problem in other_parameters(Manifest.load(folder), model).values():
        raise ValueError(
            f"{folder}: {problem}: continue with the config of that run, or begin anew with what differs: "
            "--override model"
        )


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module, checked: bool = False) -> Manifest:
    """Fill a model that no engine owns, on one rank of any layout and in any precision; otherwise as `load`."""
    reader = _reader(folder, checked)
    for problem in other_parameters(reader.manifest, model).values():
        raise ValueError(f"{folder}: {problem}: load it with its own config")
    for name, param, spec in logical_parameters(model):
        values = reader.read("weight", name, spec.flat_start, param.numel())
        param.copy_(values.view_as(param))
    for name, buffer in model.named_buffers():
        buffer.copy_(reader.read("weight", name, 0, buffer.numel()).view_as(buffer))
    return reader.manifest


def _list(root: Path) -> tuple[list[str], str | None]:
    """(checkpoints under `root`, why they cannot be listed)."""
    try:
        return [str(folder) for folder in checkpoints(root)], None
    except ValueError as error:
        return [], str(error)


def require_whole(folder: Path) -> None:
    """Every rank must call. Raises ValueError on every rank when a file is not as the manifest says, or that is bad."""
    if problems := _problems(folder):
        raise ValueError("\n".join(problems))


def _reader(folder: Path, checked: bool) -> Reader:
    if not checked:
        require_whole(folder)
    return Reader(folder)


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank; each reads its share of the files."""
    try:
        mine = Reader(folder).check_digests(*rank_and_world())
    except ValueError as error:
        mine = [str(error)]
    return list(dict.fromkeys(problem for reply in gather_json(mine) for problem in reply))


def other_parameters(manifest: Manifest, model: nn.Module) -> dict[str, str]:
    """What is wrong with each parameter that is not the same here as in the checkpoint. By the whole model, not by what
    this rank holds of it: under ZeRO some ranks hold nothing of what is wrong."""
    needed, stored = logical_shapes(model), manifest.shapes
    return {
        name: f"parameter {name} {_shape(stored.get(name))} in the checkpoint, but {_shape(needed.get(name))} here"
        for name in sorted(needed.keys() | stored.keys())
        if stored.get(name) != needed.get(name)
    }


def _shape(shape: list[int] | None) -> str:
    return "is absent" if shape is None else f"has shape {shape}"
