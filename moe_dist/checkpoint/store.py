"""Writing checkpoints so that a half-written one can never be taken for whole, and finding them again.

Files go to a hidden folder and are flushed to disk; rank 0 writes the manifest last and renames the folder. A folder
named step-NNNNNN that has a manifest is therefore complete, and everything else is rubbish that the next save removes.
A checkpoint that is a link to another folder is read there; removing it removes the link alone.
A step that is saved again first moves the earlier one aside, to step-NNNNNN.old, which counts until it is replaced: at
every moment what was complete before, or what replaces it, is there under a name that is found. Where something lies
in the way that cannot be removed, the name gets a number: step-NNNNNN.old-2.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.layout import MANIFEST, STEP_NAME, Manifest, Position, Range, RunInfo, ShardFile
from moe_dist.checkpoint.retention import Retention
from moe_dist.checkpoint.shard import write_shard
from moe_dist.disk import flush, write_durably
from moe_dist.engine.base import STATE_KINDS, Engine, frozen_parameters, logical_shapes
from moe_dist.parallel.objects import together

_DRAFT_NAME = re.compile(r"\.step-\d{6,}(-\d+)?")
Warn = Callable[[Path, OSError], None]
"""Takes what could not be removed, and why. It is in nobody's way, and the next save tries again."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank saves: the ranges it owns, in host memory, and what every rank knows of the run."""

    step: int
    skipped: int
    entries: list[tuple[Range, Tensor]]
    shapes: dict[str, list[int]]
    buffers: list[str]
    frozen: list[str]


@torch.no_grad()
def take_snapshot(engine: Engine, step: int, copy: bool, skipped: int = 0) -> Snapshot:
    """copy: the values as they are now, for they will change while they are written; else, on CPU, views of them."""
    entries = []
    for kind in STATE_KINDS:
        for piece in engine.held(kind):
            start, values = piece.owned_part()
            if values.numel():
                stored = Range(kind=kind, name=piece.name, start=start, length=values.numel())
                entries.append((stored, values.detach().to("cpu", torch.float32, copy=copy).contiguous()))
    buffers = sorted(name for name, _ in engine.model.named_buffers())
    frozen = sorted(frozen_parameters(engine.model))
    return Snapshot(step, skipped, entries, dict(sorted(logical_shapes(engine.model).items())), buffers, frozen)


def write_checkpoint(
    root: Path,
    snapshot: Snapshot,
    info: RunInfo,
    retention: Retention | None,
    validation_loss: float | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[], None] = lambda: None,
    warn: Warn = lambda path, error: None,
) -> Path:
    """Write a checkpoint under `root` and remove those that `retention` does not keep; every rank of `group` must call.

    retention: None removes nothing. progress: called now and then while this rank writes. warn: called on rank 0.
    Returns the folder. Raises RuntimeError on every rank when any rank failed; what was there before stays.
    """
    rank, step = dist.get_rank(), snapshot.step
    final = root / f"step-{step:06d}"

    def agreed(work: Callable[[], Any], only_first: bool = False, failure: str = "was not written") -> list[Any]:
        return together(work if rank == 0 or not only_first else lambda: None, f"checkpoint {final} {failure}", group)

    def prepare() -> str:
        cleared = _cleared(root / f".step-{step:06d}", warn)
        cleared.mkdir(parents=True)
        return cleared.name

    def write() -> dict[str, Any]:
        entries = [(piece, [values]) for piece, values in snapshot.entries]
        return asdict(write_shard(draft / f"rank-{rank:05d}.safetensors", entries, progress))

    def commit() -> None:
        write_durably(draft / MANIFEST, _manifest(snapshot, info, shards, validation_loss).dumps())
        _commit(draft, final, warn)

    draft = root / agreed(prepare, only_first=True)[0]
    try:
        shards = [ShardFile.of(written) for written in agreed(write)]
        agreed(commit, only_first=True)
    except RuntimeError:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    if retention is not None:
        failure = "was written, but older ones could not be looked at"
        agreed(lambda: prune(root, retention, step, warn), only_first=True, failure=failure)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first; what cannot be looked into is taken for one, and who reads it
    says why. So is what holds files but no manifest and is newer than all complete ones: somebody took it away, where
    older ones are a removal that was cut short. Raises ValueError when `root` cannot be listed: there may be some."""
    found = [path for _, path in _numbered(root, lambda path: _complete(path) or any(path.glob("*.safetensors")))]
    newest = max((at for at, path in enumerate(found) if _complete(path)), default=0)
    return [path for at, path in enumerate(found) if at >= newest or _complete(path)]


def prune(root: Path, retention: Retention, newest: int, warn: Warn) -> None:
    """Remove what `retention` does not keep, after step `newest` was written, and what a kill left half done.

    Later steps go too. The run fell back past them because they were damaged, and has a history of its own by now:
    kept, they would be taken for the newest as soon as they can be read again, or for the best. Of earlier ones, what
    has no readable manifest does not count, and stays.
    """

    def try_to_remove(path: Path) -> None:
        try:
            remove(path)
        except OSError as error:
            warn(path, error)

    losses: dict[int, float | None] = {}
    found: list[tuple[int, Path]] = []
    for step, path in _numbered(root, _complete):
        if step > newest or (path.suffix.startswith(".old") and _complete(path.with_suffix(""))):
            try_to_remove(path)
            continue
        try:
            losses[step] = Manifest.load(path).validation_loss
        except ValueError:
            continue
        found.append((step, path))
    kept = retention.kept(losses)
    for step, path in found:
        if step not in kept:
            try_to_remove(path)
    for path in root.glob("*step-*"):
        half_done = _DRAFT_NAME.fullmatch(path.name) or (STEP_NAME.fullmatch(path.name) and not _complete(path))
        if half_done and (path.is_dir() or path.is_symlink()):
            try_to_remove(path)


def remove(checkpoint: Path) -> None:
    """The manifest goes first: what is left is no checkpoint any more. Of a link, the link alone."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    flush(checkpoint)
    shutil.rmtree(checkpoint)


def _numbered(root: Path, wanted: Callable[[Path], bool]) -> list[tuple[int, Path]]:
    """(step, folder) of wanted checkpoints, oldest first; of two of a step, the one that was moved aside first."""
    try:
        names = os.listdir(root)  # not glob, which finds nothing where it may not look
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{root} cannot be listed: {error.strerror}; make it readable, or name another run") from None
    found = [
        (int(named[1]), named[2] is None, root / name)
        for name in names
        if (named := STEP_NAME.fullmatch(name)) and wanted(root / name)
    ]
    return [(step, path) for step, _, path in sorted(found)]


def _complete(path: Path) -> bool:
    try:
        return stat.S_ISREG((path / MANIFEST).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _manifest(snapshot: Snapshot, info: RunInfo, shards: list[ShardFile], validation_loss: float | None) -> Manifest:
    return Manifest(
        step=snapshot.step,
        skipped=snapshot.skipped,
        validation_loss=validation_loss,
        data_position=Position(seed=info.seed if info.data_seed is None else info.data_seed, next_step=snapshot.step),
        random_state=Position(seed=info.seed, next_step=snapshot.step),
        run=info.run,
        config=info.config,
        kinds=list(STATE_KINDS),
        shapes=snapshot.shapes,
        buffers=snapshot.buffers,
        frozen=snapshot.frozen,
        files=shards,
    )


def _commit(draft: Path, final: Path, warn: Warn) -> None:
    flush(draft)
    if final.exists():  # the same step, saved again
        final.rename(_cleared(final.with_suffix(".old"), warn))
    draft.rename(final)
    flush(final.parent)


def _cleared(path: Path, warn: Warn) -> Path:
    """`path`, where nothing lies any more; or path-2, path-3, ..., where what lies there cannot be removed."""
    free, number = path, 1
    while os.path.lexists(free):
        try:
            remove(free)
        except OSError as error:
            warn(free, error)
            number += 1
            free = path.with_name(f"{path.name}-{number}")
    return free
