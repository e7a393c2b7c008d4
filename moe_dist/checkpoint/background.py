"""Saving a run's checkpoints, in line or behind the training's back.

In the background, `save` copies what this rank owns to host memory and returns; a thread writes, hashes and commits.
Ranks agree on the commit over a gloo group of its own, which nothing but these threads uses, one save at a time: so no
collective of the training can meet one of the save, and a rank that died is noticed at once. Both ways run the same
code on the same values, and write the same bytes.
"""

import math
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from moe_dist.checkpoint.finite import require_finite
from moe_dist.checkpoint.layout import RunInfo
from moe_dist.checkpoint.retention import Retention
from moe_dist.checkpoint.store import Snapshot, take_snapshot, write_checkpoint
from moe_dist.engine.base import Engine
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.objects import RankFailed

DEADLINE = timedelta(hours=1)
"""The longest that one rank's thread waits for the others to write their files."""


class Saver:
    """Writes a run's checkpoints under `root`. Every rank makes one, and calls every method at the same place.

    say: takes a line for the person who watches. Use as a context: leaving it in order waits for a pending save and
    raises its error; leaving it by an exception waits for the thread, and the exception goes on.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        retention: Retention,
        info: RunInfo,
        background: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.root, self.mesh, self.retention, self.info, self.say = root, mesh, retention, info, say
        self.background = background
        self._told: set[Path] = set()  # what could not be removed
        self._group = dist.new_group(backend="gloo", timeout=DEADLINE) if background else None
        self._thread: threading.Thread | None = None  # None on every rank, or on none
        self._step = 0
        self._error: BaseException | None = None

    def save(
        self,
        engine: Engine,
        step: int,
        validation_loss: float | None = None,
        skipped: int = 0,
        remove_older: bool = True,
    ) -> Path:
        """Write checkpoint `step`, or begin to; its folder. Waits for the one before, and says so.

        skipped: how many of the steps were left out, so that the optimizer has made fewer. remove_older: those that
        retention does not keep.

        Raises NotFinite on every rank when the engine holds what must not be saved, RankFailed when this save, or a
        pending one, failed on any.
        """
        self.wait()
        require_finite(engine)
        if validation_loss is not None and not math.isfinite(validation_loss):
            validation_loss = None
        snapshot = take_snapshot(engine, step, copy=self.background, skipped=skipped)
        if self.background:
            self._step, self._error = step, None
            work = (snapshot, validation_loss, remove_older)
            self._thread = threading.Thread(target=self._work, args=work, name=f"save-{step}")
            self._thread.start()
        else:
            self._write(snapshot, validation_loss, remove_older)
        return self.root / f"step-{step:06d}"

    @property
    def pending(self) -> bool:
        """Whether a save in the background has not been found ended; the same on every rank."""
        return self._thread is not None

    def raise_pending(self) -> None:
        """At every step boundary: raises RankFailed on all ranks when a save in the background has failed on one.

        Costs one small all-reduce, and only from a save to the first boundary that finds its threads ended everywhere.
        """
        if self._thread is not None and self._everywhere(not self._thread.is_alive()):
            self._settle()

    def wait(self) -> None:
        """Until nothing is pending; otherwise as `raise_pending`."""
        if self._thread is None:
            return
        if self._thread.is_alive() and self.mesh.rank == 0:
            self.say(f"checkpoint of step {self._step} is still being written; waiting for it")
        self._thread.join()
        self._settle()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # no collective: who knows where the other ranks are

    def _write(self, snapshot: Snapshot, validation_loss: float | None, remove_older: bool) -> None:
        retention = self.retention if remove_older else None
        tick = self.mesh.trail.tick  # a write that takes long is no standstill
        write_checkpoint(self.root, snapshot, self.info, retention, validation_loss, self._group, tick, self._warn)

    def _warn(self, checkpoint: Path, error: OSError) -> None:
        if checkpoint not in self._told:
            self._told.add(checkpoint)
            self.say(f"warning: {checkpoint} cannot be removed ({error.strerror}); trying again after each save")

    def _work(self, snapshot: Snapshot, validation_loss: float | None, remove_older: bool) -> None:
        try:
            self._write(snapshot, validation_loss, remove_older)
        except Exception as error:
            self._error = error

    def _settle(self) -> None:
        """The thread has ended on this rank, and has or will on the others: raise together, or be free again."""
        error, self._thread, self._error = self._error, None, None
        if not self._everywhere(error is None):
            if error is None:
                raise RankFailed(f"checkpoint of step {self._step} failed on another rank, which says why")
            raise RankFailed(str(error)) from error

    def _everywhere(self, here: bool) -> bool:
        return bool(all_reduce(torch.tensor(int(here)), self.mesh.world, dist.ReduceOp.MIN))
