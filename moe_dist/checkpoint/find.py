"""From what a person names, a run's folder or one of its checkpoints, to the checkpoint and its configuration."""

from pathlib import Path

from moe_dist.checkpoint.layout import MANIFEST
from moe_dist.checkpoint.store import checkpoints
from moe_dist.config import Config, load_config


def find_checkpoint(path: Path) -> tuple[Path, Config]:
    """(checkpoint, configuration) of a run's folder, its newest one, or of one of its checkpoints.

    Raises ValueError when there is no checkpoint, or no config.yaml that says what model it holds.
    """
    if (path / MANIFEST).is_file():
        checkpoint, run = path.resolve(), path.resolve().parents[1]
    else:
        run, found = path, checkpoints(path / "checkpoints")
        if not found:
            raise ValueError(f"{path} is neither a checkpoint nor a run with one: give runs/NAME, or a step-N in it")
        checkpoint = found[-1]
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}/config.yaml, which says what model {checkpoint} holds, is not there")
    return checkpoint, load_config(run / "config.yaml")
