"""Weights & Biases' view of metrics.jsonl: the scalars that TensorBoard is given, under the same tags.

Where they go is said as everywhere by wandb's own variables: WANDB_ENTITY, WANDB_MODE=offline, WANDB_API_KEY,
WANDB_BASE_URL, WANDB_RUN_GROUP, WANDB_TAGS. A run has one id for life, in the file wandb-id of its folder, so that a
resumed run goes on in the same one. It is a view: where it fails, that is told once, and the run goes on without.

wandb takes nothing back. Steps that a resumed run, or one that went back to a checkpoint, does once more are not sent
again: their numbers are the same, but for those of steps that are left out the second time.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.config.extras import install
from moe_dist.disk import replace_text
from moe_dist.kernels.packages import is_there
from moe_dist.train.record.board import board_scalars, timing_scalars

_ID = "wandb-id"
_SECONDS = 30  # that a start and an end may wait for the network, while the other ranks wait too
_TIMED_STEP = "time/step"  # parts of a step are known one step later


def check_wandb(project: str | None) -> None:
    """Raises ValueError, one line, where run.wandb asks for a package that is not there."""
    if project is not None and not is_there("wandb"):
        raise ValueError(
            f"run.wandb={project}, but wandb is not installed: {install('wandb')}, or set run.wandb to null"
        )


@dataclass
class WandbBoard:
    """The run named `name` of `project`, from `begin` on until something fails. settings: shown as the run's
    configuration. say: takes a line for the person who watches."""

    folder: Path
    project: str
    name: str
    settings: dict[str, Any]
    say: Callable[[str], None]
    _run: Any = field(default=None, init=False)
    _next: int = field(default=0, init=False)  # the first step that was not sent

    def begin(self) -> None:
        """Start the run, or go on with it. Once begun it stays so until `close`."""
        if self._run is not None:
            return
        with self._told():
            import wandb  # here: the import takes a second

            quiet: dict[str, Any] = dict(silent=True, console="off", init_timeout=_SECONDS, finish_timeout=_SECONDS)
            chosen = wandb.Settings(**quiet, finish_timeout_raises=True)
            mode = wandb.setup(chosen).settings.mode
            if mode in ("online", "run", "shared") and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("nobody is logged in: call `wandb login`, or set WANDB_MODE=offline")
            self._run = wandb.init(
                project=self.project,
                name=self.name,
                id=self._id(),
                resume="allow",
                dir=self.folder,
                config=self.settings,
                settings=chosen,
            )
            self._run.define_metric("time/*", step_metric=_TIMED_STEP)
            self._next = self._run.step
            self.say(f"wandb     {self._run.url or f'{mode}, in {self.folder}/wandb'}")

    def log(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        step = record["step"]
        if self._run is None or step < self._next:
            return
        with self._told():
            scalars, timing = dict(board_scalars(record)), record.get("timing", {})
            if timing:
                scalars |= {**dict(timing_scalars(timing)), _TIMED_STEP: timing["step"]}
            self._run.log(scalars, step=step, commit=True)
            self._next = step + 1

    def close(self) -> None:
        """Waits half a minute at most for what is still on its way."""
        if self._run is not None:
            with self._told():
                self._run.finish()
        self._run = None

    def _id(self) -> str:
        """Of this run, and of all its starts."""
        path = self.folder / _ID
        if not path.exists():
            replace_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._run = None
            self.say(f"warning: wandb is no longer written ({_one_line(error)}); metrics.jsonl has everything")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
