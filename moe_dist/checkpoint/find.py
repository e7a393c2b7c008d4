"""From what a person names, a run's folder or one of its checkpoints, to its configuration and a whole checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path

from moe_dist.checkpoint.layout import MANIFEST
from moe_dist.checkpoint.reshard import newest_told, require_whole
from moe_dist.checkpoint.store import checkpoints
from moe_dist.config import Config
from moe_dist.config.load import load_config


def whole_checkpoint(path: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint `path`, or the newest whole one of the run `path`; every file of it is as its manifest says.

    say: takes a line on each problem of newer ones that were passed over. Every rank must call. Raises ValueError when
    there is none, and naming files when it, or all of them, are damaged.
    """
    if (path / MANIFEST).is_file():
        require_whole(path)
        return path
    newest = newest_told(all_checkpoints(path)[0].parent, say)
    if newest is None:
        raise ValueError(f"{path} had checkpoints a moment ago, and has none now: look again")
    return newest


def all_checkpoints(path: Path) -> list[Path]:
    """`path` itself, or the checkpoints of the run `path`, or in it, oldest first. Raises ValueError when there is
    none."""
    if (path / MANIFEST).is_file():
        return [path]
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise ValueError(f"{path} is neither a checkpoint nor a run with one: give runs/NAME, or a folder step-N in it")
    return found


def run_config(path: Path) -> Config:
    """The configuration of a run, by its folder or by one of its checkpoints. Raises ValueError when there is none."""
    return load_config(run_of(all_checkpoints(path)[-1]) / "config.yaml")


def run_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's run: two above the checkpoint as it is named, else two above where links lead.

        runs/a/checkpoints -> /scratch/17        runs/a/checkpoints/step-000005 is of runs/a
        best -> runs/a/checkpoints/step-000005   best is of runs/a

    Raises ValueError when neither has a configuration.
    """
    named, real = Path(os.path.abspath(checkpoint)), checkpoint.resolve()
    for path in (named, real):
        if (path.parents[1] / "config.yaml").is_file():
            return path.parents[1]
    raise ValueError(f"{named.parents[1]}/config.yaml, which says what model {checkpoint} holds, is not there")
