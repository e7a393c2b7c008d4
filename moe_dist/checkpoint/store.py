"""Writing checkpoints so that a half-written one can never be taken for whole, and finding them again.

Files go to a hidden folder and are flushed to disk; rank 0 writes the manifest last and renames the folder. A folder
named step-NNNNNN is therefore complete, and everything else is rubbish that the next save removes.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_dist.checkpoint.layout import MANIFEST, Manifest, Range, ShardFile
from moe_dist.engine.base import STATE_KINDS, Engine, logical_shapes
from moe_dist.parallel.objects import gather_json

_STEP = re.compile(r"step-(\d{6,})")


def save(root: Path, engine: Engine, step: int, run: dict[str, Any], keep_last: int) -> Path:
    """Write checkpoint `step` under `root` and prune old ones; every rank must call. Returns its folder.

    Raises RuntimeError on every rank when any rank failed; what was there before stays.
    """
    rank = engine.mesh.rank
    final, draft = root / f"step-{step:06d}", root / f".step-{step:06d}"

    def prepare() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    _together(final, draft, rank, prepare if rank == 0 else lambda: None)
    shards = _together(final, draft, rank, lambda: asdict(_write_shard(draft, engine)))

    def commit() -> None:
        shapes = dict(sorted(logical_shapes(engine.model).items()))
        files = [ShardFile.of(shard) for shard in shards]
        manifest = Manifest(step=step, shapes=shapes, files=files, run=run)
        _write_durably(draft / MANIFEST, manifest.dumps())
        _commit(draft, final)
        _prune(root, keep_last)

    _together(final, draft, rank, commit if rank == 0 else lambda: None)
    return final


def _together(final: Path, draft: Path, rank: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returned on each rank, as JSON. Raises RuntimeError on every rank when it failed on one."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = f"rank {rank}: {caught}"
    replies = gather_json((result, error))
    errors = [reply[1] for reply in replies if reply[1]]
    if errors:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise RuntimeError(f"checkpoint {final} was not written: " + "; ".join(errors))
    return [reply[0] for reply in replies]


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    found = [(int(m[1]), path) for path in root.glob("step-*") if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / MANIFEST).is_file()]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(folder: Path, engine: Engine) -> ShardFile:
    tensors: dict[str, torch.Tensor] = {}
    ranges = []
    for kind in STATE_KINDS:
        for piece in engine.held(kind):
            if piece.owned:
                stored = Range(kind=kind, name=piece.name, start=piece.start, length=piece.values.numel())
                tensors[stored.key] = piece.values.detach().float().cpu().contiguous().clone()
                ranges.append(stored)
    path = folder / f"rank-{engine.mesh.rank:05d}.safetensors"
    save_file(tensors, path)
    _flush(path)
    return ShardFile(file=path.name, size=path.stat().st_size, sha256=file_digest(path), ranges=ranges)


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _commit(draft: Path, final: Path) -> None:
    _flush(draft)
    if final.exists():  # the same step, saved again
        (final / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(final)
    draft.rename(final)
    _flush(final.parent)


def _prune(root: Path, keep_last: int) -> None:
    for old in checkpoints(root)[:-keep_last]:
        (old / MANIFEST).unlink()  # first: what is left is no checkpoint any more
    for path in root.glob("*step-*"):  # those, and what a kill left half written or half removed
        draft = path.name.startswith(".")
        if _STEP.fullmatch(path.name.removeprefix(".")) and (draft or not (path / MANIFEST).is_file()):
            shutil.rmtree(path)
