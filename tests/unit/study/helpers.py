"""A study on disk, and a training command that pretends."""

import sys
from pathlib import Path

from moe_dist.study.design.grid import Study, load_study

STUDY = """
name: toy
base: base.yaml
overrides: {train.steps: 8}
axes:
  model.moe.capacity_factor: [0.5, null]
seeds: [0, 1]
retries: 0
"""

_TRAIN = '''
"""Writes what a run writes: a loss by its seed, a drop rate by its capacity. Each call adds a line to `calls`."""
import json, os, sys, time
from pathlib import Path
import yaml
config = yaml.safe_load(Path(sys.argv[1]).read_text())
run, steps = Path(config["run"]["root"]) / config["run"]["name"], config["train"]["steps"]
factor, seed = config["model"]["moe"]["capacity_factor"], config["train"]["seed"]
run.mkdir(parents=True, exist_ok=True)
with Path({calls!r}).open("a") as file:
    file.write(run.parent.name + "\\n")
{trouble}
with (run / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        record = dict(step=step, loss=3.0 + seed + (steps - step), step_seconds=0.25 * step)
        record |= dict(tokens_per_second=100.0 / step, drop_rate=(1 - (factor or 1)) * (2 if step <= 6 else 1))
        record |= dict(load_max_over_mean=1.5, dispatch_rows_bytes=1000000 * step, dispatch_bytes=0)
        if step == steps:
            record |= dict(validation_loss=2.0 + seed + (0 if factor is None else 0.5), **{measured})
        file.write(json.dumps(record) + "\\n")
(run / "config.yaml").write_text(Path(sys.argv[1]).read_text())
(run / "environment.json").write_text(json.dumps(dict(device="cpu", revision="abc")))
(run / "status.new").write_text(json.dumps(dict(state="finished", step=steps)))
(run / "status.new").replace(run / "status.json")
'''


def write_study(folder: Path, text: str = STUDY) -> Path:
    (folder / "base.yaml").write_text("train: {seq_len: 32}\noptim: {warmup_steps: 2}\n")
    path = folder / "study.yaml"
    path.write_text(text + f"root: {folder}/root\n")
    return path


def toy_study(folder: Path, text: str = STUDY) -> Study:
    return load_study(write_study(folder, text))


class Pretend:
    """A command for the runner. `trouble` is Python that runs before the run is written; `run` is its folder. measured:
    what the last evaluation says beside the loss."""

    def __init__(self, folder: Path, trouble: str = "", **measured: float) -> None:
        self.measured = measured or {"validation_bits_per_byte": 4.0}
        self.calls, self.script = folder / "calls", folder / "train.py"
        self.calls.touch()
        self.mend(trouble)

    def mend(self, trouble: str = "") -> None:
        self.script.write_text(_TRAIN.format(calls=str(self.calls), trouble=trouble, measured=self.measured))

    def __call__(self, config: Path, ranks: int) -> list[str]:
        return [sys.executable, str(self.script), str(config)]

    def trained(self) -> list[str]:
        """Names of the points, in the order they were trained."""
        return self.calls.read_text().split()
