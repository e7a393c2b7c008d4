"""Studies of real points: one is killed in the middle and started again; others measure something else than bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from moe_dist.cli import main
from moe_dist.study.design.grid import load_study
from moe_dist.study.ledger.ledger import Ledger
from tests.unit.data.test_indexed import write as write_indexed

_BASE = """
model: {d_model: 128, num_layers: 4, num_heads: 2, d_ff: 256, moe: {num_experts: 4, top_k: 1}}
optim: {warmup_steps: 1}
train: {steps: 5, seq_len: 128, global_batch: 16, threads: 1}
run: {save_every: 2, eval_sequences: 4, tensorboard: false}
"""


def _start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "moe_dist.cli", "study", "run", str(path)])


def _kill_with_children(process: subprocess.Popen[bytes]) -> None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_killed_study_completes_without_repeating_a_point(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(_BASE)
    path = tmp_path / "study.yaml"
    axes = "axes: {model.moe.capacity_factor: [1.0, null]}"
    path.write_text(f"name: pair\nbase: base.yaml\nroot: {tmp_path}\n{axes}\n")
    study = load_study(path)
    first, second = study.points

    process = _start(path)
    manifest = second.run / "checkpoints" / "step-000002" / "manifest.json"
    while not manifest.exists():
        assert process.poll() is None, "the study ended before its second point had a checkpoint"
        time.sleep(0.005)
    _kill_with_children(process)
    assert list(Ledger(study.ledger).latest()) == [first.name]
    before = {path: path.stat().st_mtime_ns for path in first.run.rglob("*")}

    assert _start(path).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in first.run.rglob("*")} == before  # not touched
    assert "resuming" in (second.folder / "train.log").read_text()
    records = Ledger(study.ledger).records()
    assert [(record["point"], record["status"], record["steps"]) for record in records] == [
        (first.name, "finished", 5),
        (second.name, "finished", 5),
    ]
    steps = [json.loads(line)["step"] for line in (second.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert records[0]["drop_rate"] > 0 == records[1]["drop_rate"]
    assert records[1]["dispatch_rows_bytes"] == 16 * 128 * 4 * 128 * 4  # tokens x layers x d_model x bytes
    assert records[1]["dispatch_bytes"] == 0

    command = [sys.executable, "-m", "moe_dist.cli", "study", "report", str(path)]
    page = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[0])
    assert "2 of 2 points have finished" in page.read_text()


def test_studies_of_token_ids_and_of_classifiers(tmp_path: Path) -> None:
    """What their runs measured is in the ledger and the report, by the names of metrics.jsonl."""
    rng = np.random.default_rng(0)
    corpus = write_indexed(tmp_path / "corpus", [[rng.integers(0, 50, 300).tolist()] for _ in range(9)])
    texts = [{"text": f"{n} squared is {n * n}", "label": "even" if n % 2 else "odd"} for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "base.yaml").write_text(
        "model: {d_model: 32, num_layers: 1, num_heads: 2, d_ff: 48, vocab_size: 300, moe: {num_experts: 2}}\n"
        "optim: {warmup_steps: 1}\ntrain: {steps: 2, seq_len: 16, global_batch: 8, threads: 1}\n"
        "run: {eval_sequences: 4, tensorboard: false}\n"
    )
    tokens = f"{{data.kind: indexed, data.paths: [{corpus}]}}"
    labels = f"{{task: classification, data.kind: jsonl, data.paths: [{tmp_path}/texts.jsonl]}}"
    for name, overrides, measures in (
        ("tokens", tokens, ["validation_bits_per_token"]),
        ("classes", labels, ["validation_accuracy", "validation_macro_f1", "test_loss", "test_accuracy"]),
    ):
        path = tmp_path / f"{name}.yaml"
        axes = "axes: {model.moe.capacity_factor: [1.0]}"
        path.write_text(f"name: {name}\nbase: base.yaml\nroot: {tmp_path}\n{axes}\noverrides: {overrides}\n")
        assert main(["study", "run", str(path)]) == 0
        study = load_study(path)
        (record,) = Ledger(study.ledger).records()
        last = json.loads((study.points[0].run / "metrics.jsonl").read_text().splitlines()[-1])
        for measure in ["validation_loss", *measures]:
            assert record[measure] == last[measure] is not None, (measure, record)
        assert main(["study", "report", str(path)]) == 0
        page = (study.folder / "report.md").read_text()
        assert f"| {measures[0].replace('_per_', '/').replace('_', ' ')} |" in page, page
