"""A short timed probe: how long steps, evaluations and the start of a study's points take on this machine.

The smallest and the largest point, by planned FLOPs of a step (of equal ones by the experts' places), train a few
steps as real processes in a temporary folder. Between them a step is taken to need

    seconds = a + b * planned FLOPs,    b >= 0

so is an evaluation, in the FLOPs of its forward passes. Start-up is what is left: imports, the data, the model, and the
exit. The first steps are left out, in which memory is asked for the first time.

study plan writes probe.json into the study's folder. It holds as long as smallest and largest point are the same ones:
adding points between them changes nothing. Under `equal: time` the steps of the points follow from it, wherever they
run and are reported; times of another machine are measured anew by study plan, until a point has begun.
"""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from moe_dist.config import Config
from moe_dist.config.load import dump_config
from moe_dist.config.model import STRICT
from moe_dist.config.parse import parse_as
from moe_dist.disk import replace_text
from moe_dist.study.design.planned import buffer_rows, forward_flops, planned_flops
from moe_dist.study.shares import environment, on_cores, shares, visible_gpus

_STEPS = 12
_LEFT_OUT = 4

Command = Callable[[Path, int], list[str]]
"""(config file, ranks) -> the command that trains it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """One point that was timed.

    digest: of its configuration, without what its length, its seed and its folder are. flops: planned, of a step.
    step_seconds: median. evaluation_flops, evaluation_seconds: of one evaluation, with the checkpoint after it.
    start_seconds: of the process, all else. bytes_per_step: that the run writes beside checkpoints.
    """

    __pydantic_config__ = STRICT

    digest: str
    flops: float
    step_seconds: float
    evaluation_flops: float
    evaluation_seconds: float
    start_seconds: float
    bytes_per_step: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What probe.json says. points: the smallest and the largest, or one where there is no other."""

    __pydantic_config__ = STRICT

    machine: str
    measured: str
    ranks: int
    points: list[Probed]

    def fits(self, points: Sequence[Config], ranks: int) -> bool:
        """Whether it is of these points, by `extremes`, whatever the machine."""
        return (self.ranks, [each.digest for each in self.points]) == (ranks, [digest(point) for point in points])

    def step_seconds(self, config: Config) -> float:
        """Of one step of a configuration."""
        return _line([(each.flops, each.step_seconds) for each in self.points], step_flops(config, self.ranks))

    def evaluation_seconds(self, config: Config) -> float:
        """Of one evaluation."""
        return _line(
            [(each.evaluation_flops, each.evaluation_seconds) for each in self.points], evaluation_flops(config)
        )

    @property
    def start_seconds(self) -> float:
        """Mean over the points."""
        return sum(each.start_seconds for each in self.points) / len(self.points)

    @property
    def bytes_per_step(self) -> float:
        """That a run writes beside checkpoints; the larger of the points."""
        return max(each.bytes_per_step for each in self.points)


def probe_path(folder: Path) -> Path:
    """folder: of the study."""
    return folder / "probe.json"


def read_probe(folder: Path) -> Probe | None:
    """Of the study in `folder`; None where nothing was measured. Raises ValueError for a file that is none."""
    path = probe_path(folder)
    if not path.exists():
        return None
    try:
        return parse_as(Probe, json.loads(path.read_bytes()), str(path))
    except ValueError as error:
        raise ValueError(f"{path} is no probe ({str(error).splitlines()[0]}); remove it and plan again") from None


def write_probe(folder: Path, probe: Probe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(probe_path(folder), json.dumps(asdict(probe), indent=1) + "\n")


def extremes(points: Sequence[Config], ranks: int) -> list[Config]:
    """The smallest and the largest, by planned FLOPs of a step, then by the experts' places; one if all are alike."""
    ordered = sorted(points, key=lambda each: (step_flops(each, ranks), buffer_rows(each, ranks)))
    ends = [ordered[0], ordered[-1]] if ordered else []
    return ends[:1] if ends and digest(ends[0]) == digest(ends[1]) else ends


def measure_probe(points: Sequence[Config], ranks: int, command: Command, at_once: int = 1) -> Probe:
    """Times the points one after another, on the cores that each of `at_once` has. Raises ValueError when one does not
    train, with its last words."""
    probed = [_measure(point, ranks, command, at_once) for point in points]
    return Probe(
        machine=machine(), measured=datetime.now(UTC).isoformat(timespec="seconds"), ranks=ranks, points=probed
    )


def step_flops(config: Config, ranks: int) -> float:
    """Planned, mean over the run."""
    return planned_flops(config, ranks) / config.train.steps


def evaluation_flops(config: Config) -> float:
    """Of the forward passes of one evaluation: one, or two where drops are evaluated too."""
    passes = 2 if any(moe.eval_capacity_factor is not None for moe in config.model.moe_sections) else 1
    return passes * config.run.eval_sequences * config.train.seq_len * forward_flops(config)


def digest(config: Config) -> str:
    """Of what a step does, and of the texts that an evaluation reads: not of how many there are, of seeds, nor of
    eval_capacity_factor, which may follow from the number of steps."""
    values = asdict(config)
    for moe in (values["model"]["moe"], values["model"]["attention"]["moe"]):
        del moe["eval_capacity_factor"]
    run = {"eval_sequences": values.pop("run")["eval_sequences"]}
    for name in ("steps", "seed", "data_seed"):
        del values["train"][name]
    del values["optim"]
    return hashlib.sha256(json.dumps([values, run], sort_keys=True).encode()).hexdigest()[:16]


def machine() -> str:
    """Name and CPUs of this one."""
    return f"{platform.node()}, {len(os.sched_getaffinity(0))} CPUs"


def _measure(point: Config, ranks: int, command: Command, at_once: int) -> Probed:
    with tempfile.TemporaryDirectory(prefix="moe-dist-probe-") as name:
        folder = Path(name)
        run = replace(
            point.run,
            root=str(folder),
            name="run",
            evaluations=None,
            eval_every=_STEPS,
            save_every=_STEPS,
            keep_every=None,
            keep_best=False,
            sample_tokens=0,
            time_limit=None,
        )
        config = replace(point, run=run, train=replace(point.train, steps=_STEPS))
        (folder / "point.yaml").write_text(dump_config(config), encoding="utf-8")
        began = time.time()
        share = shares(at_once, ranks, os.sched_getaffinity(0), visible_gpus())[0]
        with on_cores(share.cores):
            own = environment(share, at_once, ranks, os.environ)
            ended = _train(command(folder / "point.yaml", ranks), folder, own)
        return _read(config, ranks, folder / "run", began, ended)


def _train(command: list[str], folder: Path, own: Mapping[str, str]) -> float:
    """When it ended, in seconds since 1970. own: the environment."""
    with (folder / "train.log").open("wb") as log:
        code = subprocess.run(command, env=own, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"the probe's run ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}")
    return time.time()


def _read(config: Config, ranks: int, run: Path, began: float, ended: float) -> Probed:
    """What the files of a finished run say, and when they were written."""
    metrics = run / "metrics.jsonl"
    steps = [json.loads(line)["step_seconds"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    opened, finished = ((run / name).stat().st_mtime for name in ("environment.json", "status.json"))
    board = sum(path.stat().st_size for path in run.glob("tensorboard/*"))
    return Probed(
        digest=digest(config),
        flops=step_flops(config, ranks),
        step_seconds=median(steps[_LEFT_OUT:]),
        evaluation_flops=evaluation_flops(config),
        evaluation_seconds=max(0.0, finished - opened - sum(steps)),
        start_seconds=max(0.0, opened - began + ended - finished),
        bytes_per_step=(metrics.stat().st_size + board) / len(steps),
    )


def _line(known: Sequence[tuple[float, float]], at: float) -> float:
    """Through one or two points; level at their mean where they would fall."""
    (x, y), (far_x, far_y) = known[0], known[-1]
    mean = sum(value for _, value in known) / len(known)
    if far_x <= x or far_y <= y:
        return mean
    return max(y + (far_y - y) / (far_x - x) * (at - x), 1e-9)
