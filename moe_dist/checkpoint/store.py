"""Writing checkpoints so that a half-written one can never be taken for whole, and finding them again.

Files go to a hidden folder and are flushed to disk; rank 0 writes the manifest last and renames the folder. A folder
named step-NNNNNN that has a manifest is therefore complete, and everything else is rubbish that the next save removes.
A step that is saved again first moves the earlier one aside, to step-NNNNNN.old, which counts until it is replaced: at
every moment what was complete before, or what replaces it, is there under a name that is found.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.layout import MANIFEST, STEP_NAME, Manifest, Position, Range, RunInfo, ShardFile
from moe_dist.checkpoint.retention import Retention
from moe_dist.checkpoint.shard import flush, write_durably, write_shard
from moe_dist.engine.base import STATE_KINDS, Engine, logical_shapes
from moe_dist.parallel.objects import gather_json


@dataclass(frozen=True)
class Snapshot:
    """What one rank saves: the ranges it owns, in host memory, and what every rank knows of the run."""

    step: int
    skipped: int
    entries: list[tuple[Range, Tensor]]
    shapes: dict[str, list[int]]
    buffers: list[str]


@torch.no_grad()
def take_snapshot(engine: Engine, step: int, copy: bool, skipped: int = 0) -> Snapshot:
    """copy: the values as they are now, for they will change while they are written; else, on CPU, views of them."""
    entries = []
    for kind in STATE_KINDS:
        for piece in engine.held(kind):
            if piece.owned and piece.values.numel():
                stored = Range(kind=kind, name=piece.name, start=piece.start, length=piece.values.numel())
                entries.append((stored, piece.values.detach().to("cpu", torch.float32, copy=copy).contiguous()))
    buffers = sorted(name for name, _ in engine.model.named_buffers())
    return Snapshot(step, skipped, entries, dict(sorted(logical_shapes(engine.model).items())), buffers)


def write_checkpoint(
    root: Path,
    snapshot: Snapshot,
    info: RunInfo,
    retention: Retention,
    validation_loss: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint under `root` and remove those that `retention` does not keep; every rank of `group` must call.

    Returns its folder. Raises RuntimeError on every rank when any rank failed; what was there before stays.
    """
    rank, step = dist.get_rank(), snapshot.step
    final, draft = root / f"step-{step:06d}", root / f".step-{step:06d}"

    def together(work: Callable[[], Any], only_first: bool = False, failure: str = "was not written") -> list[Any]:
        return _together(work if rank == 0 or not only_first else lambda: None, f"checkpoint {final} {failure}", group)

    def prepare() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def write() -> dict[str, Any]:
        entries = [(piece, [values]) for piece, values in snapshot.entries]
        return asdict(write_shard(draft / f"rank-{rank:05d}.safetensors", entries))

    def commit() -> None:
        write_durably(draft / MANIFEST, _manifest(snapshot, info, shards, validation_loss).dumps())
        _commit(draft, final)

    try:
        together(prepare, only_first=True)
        shards = [ShardFile.of(written) for written in together(write)]
        together(commit, only_first=True)
    except RuntimeError:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    failure = "was written, but older ones could not be removed"
    together(lambda: prune(root, retention, step), only_first=True, failure=failure)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    found = [
        (int(named[1]), named[2] is None, path)
        for path in root.glob("step-*")
        if (named := STEP_NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, _, path in sorted(found)]


def prune(root: Path, retention: Retention, newest: int) -> None:
    """Remove what `retention` does not keep, after step `newest` was written, and what a kill left half done.

    Later steps are not of this run's history: it fell back to an earlier checkpoint because they are broken. They do
    not count, and stay until they are written again; so does what has no readable manifest.
    """
    losses: dict[int, float | None] = {}
    found: list[tuple[int, Path]] = []
    for path in checkpoints(root):
        if path.suffix == ".old" and (path.with_suffix("") / MANIFEST).is_file():
            remove(path)
            continue
        try:
            manifest = Manifest.load(path)
        except ValueError:
            continue
        if manifest.step <= newest:
            losses[manifest.step] = manifest.validation_loss
            found.append((manifest.step, path))
    kept = retention.kept(losses)
    for step, path in found:
        if step not in kept:
            remove(path)
    for path in root.glob("*step-*"):
        draft = path.name.startswith(".")
        if STEP_NAME.fullmatch(path.name.removeprefix(".")) and (draft or not (path / MANIFEST).is_file()):
            shutil.rmtree(path)


def remove(checkpoint: Path) -> None:
    """The manifest goes first: what is left is no checkpoint any more."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    flush(checkpoint)
    shutil.rmtree(checkpoint)


def _manifest(snapshot: Snapshot, info: RunInfo, shards: list[ShardFile], validation_loss: float | None) -> Manifest:
    position = Position(seed=info.seed, next_step=snapshot.step)
    return Manifest(
        step=snapshot.step,
        skipped=snapshot.skipped,
        validation_loss=validation_loss,
        data_position=position,
        random_state=position,
        run=info.run,
        config=info.config,
        kinds=list(STATE_KINDS),
        shapes=snapshot.shapes,
        buffers=snapshot.buffers,
        files=shards,
    )


def _commit(draft: Path, final: Path) -> None:
    flush(draft)
    if final.exists():  # the same step, saved again
        old = final.with_suffix(".old")
        if old.exists():
            remove(old)
        final.rename(old)
    draft.rename(final)
    flush(final.parent)


def _together(work: Callable[[], Any], failure: str, group: dist.ProcessGroup | None) -> list[Any]:
    """What `work` returned on each rank, by way of JSON. Raises RuntimeError on every rank when it failed on one."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = f"rank {dist.get_rank()}: {caught}"
    replies = gather_json((result, error), group)
    errors = [reply[1] for reply in replies if reply[1]]
    if errors:
        raise RuntimeError(f"{failure}: " + "; ".join(errors))
    return [reply[0] for reply in replies]
