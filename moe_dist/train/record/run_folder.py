"""A run on disk: its folder, its configuration, its environment and its status.

runs/NAME/
  config.yaml        everything, resolved       environment.json   versions, backends, layout, data, revision
  metrics.jsonl      one line a step            tensorboard/
  checkpoints/step-000100/                      logs/rank-00000.log, of a standstill logs/collectives.log
  status.json        running | finished | preempted | failed, with the reason
  heartbeats/        what each rank did last         restarts.json    starts that got nowhere
  tokenizer.json     of a classifier                 confusion.json, confusion.png   how it did on the test split
  init_from.json     the checkpoint whose weights the run began with, if train.init_from named one
  starts.jsonl       when each start began and ended       profile/   traces of the steps that --profile names
  tokenizer/         of a language model whose tokens are no bytes; what data.tokenizer reads
  roll_backs.jsonl   one line each time that the run went back to a checkpoint; metrics.jsonl forgets what was then
  run.lock           held by rank 0 while the run lives
  wandb-id           under run.wandb: the id of all starts of this run        wandb/   what wandb keeps of each
Of a run in jobs of slurm/train.sbatch, written by moe_dist/cluster:
  history.jsonl      every start, and what ended it        slurm/JOB.out   what the job said
  logs/start-001/rank-00000.err   standard error of a rank       ends/   exit codes of ranks
"""

import json
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.store import checkpoints
from moe_dist.config import Config
from moe_dist.config.load import dump_config
from moe_dist.disk import replace_text
from moe_dist.engine.adamw import describe_implementation
from moe_dist.models.backends import describe_backends
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.objects import RankFailed, together
from moe_dist.train.exit_codes import FAILED, EndRun
from moe_dist.train.record.status import FILE as STATUS
from moe_dist.train.record.status import read_status, write_status

ROLL_BACKS = "roll_backs.jsonl"
_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "triton",
    "flash-attn",
    "apex",
    "safetensors",
    "numpy",
    "tokenizers",
)


class RunFolder:
    """Paths of one run. Only rank 0 writes, but for the logs, heartbeats, and the reason of a failure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._before = self._written()  # the status of an earlier start

    def newest_checkpoint(self) -> Path | None:
        found = checkpoints(self.checkpoints)
        return found[-1] if found else None

    def refuse_second_start(self) -> None:
        """Raises ValueError when the folder holds a run."""
        if (self.path / "metrics.jsonl").exists() or self.newest_checkpoint() is not None:
            raise ValueError(
                f"{self.path} already holds a run: continue it with --resume, or choose another --run.name"
            )

    def write_config(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.path / "config.yaml", dump_config(config))

    def write_environment(self, config: Config, mesh: Mesh, device: torch.device, data: dict[str, Any]) -> None:
        """data: what the splits hold and what was left out, as `Task.data_record` says it, and how documents lie."""
        layout = mesh.layout
        record = {
            "packages": package_versions(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "host": socket.gethostname(),
            "cpu": _cpu_name(),
            "threads_per_rank": torch.get_num_threads(),
            "backends": describe_backends(config.model, device.type)
            | {"optimizer": describe_implementation(config.optim)},
            "layout": {name: getattr(layout, name) for name in ("world", "dp", "tp", "ep", "etp", "edp")},
            "revision": _git_revision(),
            "data": data,
        }
        replace_text(self.path / "environment.json", json.dumps(record, indent=1))

    def write_text(self, name: str, text: str) -> None:
        replace_text(self.path / name, text)

    def write_status(self, state: str, **details: Any) -> None:
        write_status(self.path, state, **details)

    def note_roll_back(self, step: int, reason: str) -> None:
        """That the run goes back to a checkpoint after step `step`; on the disk when this returns."""
        with (self.path / ROLL_BACKS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "reason": reason}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def failures_noted(
        self, rank: int, log: logging.Logger | None = None, but: tuple[type[BaseException], ...] = ()
    ) -> Iterator[None]:
        """Within, what ends this start is noted in the status and the log; on any rank. but: what is not."""
        try:
            yield
        except but:
            raise
        except BaseException as error:
            if log is not None:
                log.exception("stopped")
            with suppress(OSError, ValueError):  # the disk may be what has failed
                self._note_failure(error, rank)
            raise

    def _note_failure(self, error: BaseException, rank: int) -> None:
        """The first reason of this start stays: that of the others is that they lost the rank that failed."""
        if read_status(self.path)["state"] == "failed" and self._written() != self._before:
            return
        if isinstance(error, EndRun):  # the same on every rank
            if rank == 0:
                self.write_status("failed", reason=str(error), code=error.code)
        else:
            where = {"rank": rank} if rank else {}
            self.write_status("failed", reason=f"{type(error).__name__}: {error}", **where)

    def _written(self) -> int | None:
        try:
            return (self.path / STATUS).stat().st_mtime_ns
        except OSError:
            return None

    def rank_log(self, rank: int) -> logging.Logger:
        """A logger that writes logs/rank-NNNNN.log."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        name = self.path / "logs" / f"rank-{rank:05d}.log"
        handler = logging.FileHandler(name, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log = logging.getLogger(f"moe_dist.rank{rank}")
        for old in list(log.handlers):
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        return log


def write_together(folder: Path, work: Callable[[], None]) -> None:
    """`work` on every rank, which must all call. Raises EndRun on every rank when it failed on one: the disk of
    `folder` may be full."""
    try:
        together(work, f"{folder} cannot be written to")
    except RankFailed as error:
        raise EndRun(FAILED, f"{error}; make room or give rights there, or choose another --run.root") from None


def package_versions() -> dict[str, str | None]:
    """Of what decides the numbers of a run; None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), _machine())
    return _machine()


def _machine() -> str:
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    except OSError:
        return None  # no git on this machine
    return shown.stdout.strip() or None
