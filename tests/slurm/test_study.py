"""A study handed to Slurm as an array on two nodes: the losses of the same study on this machine alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger
from tests.slurm.conftest import ROOT, Cluster, wait_until

pytestmark = pytest.mark.timeout(300)
BASE = """
model: {d_model: 32, num_layers: 1, num_heads: 2, d_ff: 48, moe: {num_experts: 2}}
data: {kind: text, paths: [TEXT]}
optim: {warmup_steps: 1}
train: {steps: 5, seq_len: 16, global_batch: 8, threads: 1}
run: {eval_sequences: 4, tensorboard: false, sample_tokens: 0}
"""


def write(folder: Path, root: str, executor: str) -> Study:
    path = folder / f"{root}.yaml"
    path.write_text(
        f"name: pair\nbase: base.yaml\naxes: {{model.moe.capacity_factor: [0.5, null]}}\nroot: {folder}/{root}\n"
        f"executor: {executor}\nat_once: 2\nslurm: {{time: '10', overcommit: true}}\n"
    )
    return load_study(path)


def measured(study: Study) -> dict[str, dict[str, Any]]:
    """What the ledger says of the finished points, but for times, places and the machine."""
    names = ("status", "attempt", "steps", "loss", "validation_loss", "drop_rate", "drop_rate_whole_run")
    return {point: {name: line[name] for name in names} for point, line in Ledger(study.ledger).latest().items()}


def test_an_array_gives_the_losses_of_the_machine_alone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(4000)))
    (tmp_path / "base.yaml").write_text(BASE.replace("TEXT", str(tmp_path / "text.txt")))
    local, handed = write(tmp_path, "local", "local"), write(tmp_path, "slurm", "slurm")
    study = [sys.executable, "-m", "moe_dist.cli", "study"]

    said = cluster.run(*study, "submit", handed.path)
    job = said.split()[1].rstrip(":")
    assert said.startswith(f"job {job}: points 0-1 of pair, at most 2 at once")
    assert "wait or run already" in cluster.run(*study, "submit", handed.path, refused=True)
    cluster.run(*study, "run", local.path, "--at-once", "1")

    def over() -> bool:
        return cluster.run("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%K") == ""

    wait_until(over, 200, handed.folder / "slurm" / f"{job}_0.out")
    assert measured(handed) == measured(local)
    assert len(measured(handed)) == 2 and {line["status"] for line in measured(handed).values()} == {"finished"}
    logs = sorted(path.name for path in (handed.folder / "slurm").iterdir())
    assert logs == [f"{job}_0.out", f"{job}_1.out"]
    assert json.loads((handed.folder / "jobs.jsonl").read_text())["points"] == [0, 1]
    assert not list(ROOT.glob("slurm-*.out"))
