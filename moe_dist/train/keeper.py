"""The checkpoints of a run that is under way: written when due, and gone back to when it must."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.layout import RunInfo
from moe_dist.checkpoint.reshard import load, newest_told, refuse_other_parameters
from moe_dist.checkpoint.retention import Retention
from moe_dist.config import Config
from moe_dist.engine.base import Engine
from moe_dist.train.health.spikes import Health
from moe_dist.train.record.run_folder import RunFolder


class Keeper:
    """Every rank makes one and calls every method at the same place. Use as a context: leaving it in order waits for a
    save in the background.

    identity: what a run that continues must agree on. say: takes a line for the person who watches.
    """

    def __init__(
        self, config: Config, folder: RunFolder, engine: Engine, identity: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        run = config.run
        retention = Retention(keep_last=run.keep_last, keep_every=run.keep_every, keep_best=run.keep_best)
        train = config.train
        info = RunInfo(run=identity, config=asdict(config), seed=train.seed, data_seed=train.order_seed)
        self.folder, self.engine, self.say = folder, engine, say
        self.saver = Saver(folder.checkpoints, engine.mesh, retention, info, run.async_save, say)
        self.saved: int | None = None
        """The step of the checkpoint that holds what the engine held last, when it was written or read."""

    def load(self, checkpoint: Path, partly: bool = False) -> tuple[int, int]:
        """(steps done, steps left out among them). Its digests have been found right. partly: what has another shape
        here begins anew, and is said."""
        manifest = load(checkpoint, self.engine, checked=True, pass_over=self.say if partly else None)
        self.say(f"resuming {checkpoint}, step {manifest.step}")
        self.saved = manifest.step
        return manifest.step, manifest.skipped

    def save(self, step: int, health: Health, validation_loss: float | None) -> None:
        """As `Saver.save`. After a step that was not finite older ones stay: the weights may be what is wrong."""
        self.engine.mesh.trail.enter("checkpoint", step)
        self.saver.save(self.engine, step, validation_loss, health.skipped, remove_older=health.finite)
        self.saved = step
        health.saved(step)

    def raise_pending(self) -> None:
        """At every step boundary, as `Saver.raise_pending`."""
        self.saver.raise_pending()

    def go_back(self, step: int, health: Health) -> int:
        """To the newest whole checkpoint, from the troubled `step`; its step. Raises EndRun when that cannot help."""
        self.saver.wait()
        try:
            newest = newest_told(self.folder.checkpoints, self.say)
            if newest is not None:
                refuse_other_parameters(newest, self.engine.model)  # one from before --override model
        except ValueError as error:
            raise health.no_way_back(str(error)) from None
        if newest is None:
            raise health.no_way_back("there is no checkpoint to go back to")
        health.go_back(step, newest)
        step, health.skipped = self.load(newest)
        return step

    def __enter__(self) -> Self:
        self.saver.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.saver.__exit__(kind, error, at)
