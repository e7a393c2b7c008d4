"""Time and memory of a report over many points: 500 of them with 4,000 lines of measurements each, 2 million in all.

    /usr/bin/time -v python benchmarks/study_report.py /tmp/big --make      # once: about a gigabyte
    /usr/bin/time -v python benchmarks/study_report.py /tmp/big

The numbers are made up; files are as a run's. --lines removes the arrays beside measurements.jsonl, so that the lines
themselves are read.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.study.design.grid import Point, Study, load_study
from moe_dist.study.ledger.measurements import FILE, write_measurements
from moe_dist.study.report.report import write_report

FRACTIONS, LAYERS = 160, 24  # 4,000 lines with those of the model
STUDY = """
name: big
base: base.yaml
axes:
  model.moe.num_experts: [4, 8, 16, 32, 64]
  model.moe.top_k: [1, 2]
  model.moe.capacity_factor: [0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 4.0, null]
seeds: [0, 1, 2, 3, 4]
question:
  baseline: {model.moe.capacity_factor: null}
  smallest_difference: 0.01
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--lines", action="store_true")
    options = parser.parse_args()
    path = options.folder / "study.yaml"
    if options.make:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "base.yaml").write_text(f"model: {{num_layers: {LAYERS}}}\n", encoding="utf-8")
        path.write_text(STUDY + f"root: {options.folder}\n", encoding="utf-8")
        make(load_study(path))
        return
    start = time.perf_counter()
    study = load_study(path)
    if options.lines:
        for point in study.points:
            (point.folder / FILE).with_suffix(".npz").unlink(missing_ok=True)
    print(f"{len(study.points)} points read in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    write_report(study)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"report written in {time.perf_counter() - start:.1f} s, {time.process_time():.1f} s of CPU, {memory:.2f} GB")


def make(study: Study) -> None:
    rng = np.random.default_rng(0)
    lines, first = [], dict[tuple[int, int, bool], Path]()
    for point in study.points:
        moe = point.config.model.moe
        capped = moe.capacity_factor is not None
        loss = 3.0 + 0.02 * capped + 0.05 * point.seed + 0.004 * float(rng.standard_normal())
        lines.append(record(point, loss, 0.05 * capped))
        point.folder.mkdir(parents=True, exist_ok=True)
        same = (moe.num_experts, moe.top_k, capped)
        if same in first:
            for suffix in (".jsonl", ".npz"):
                shutil.copy(first[same].with_suffix(suffix), point.folder)
        else:
            first[same] = point.folder / FILE
            write_measurements(first[same], measurements(rng, moe.num_experts, 0.05 * capped))
    study.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def record(point: Point, loss: float, drop: float) -> dict[str, Any]:
    """A line of the ledger."""
    counted = {"tokens": 4_096_000, "flops": 1e12, "tokens_per_second": 1e5, "step_seconds": 0.04 + 0.01 * (drop == 0)}
    sizes = {"parameters": 10**6, "active_parameters": 10**5, "memory_bytes": 2**30, "steps": point.config.train.steps}
    balance = {"drop_rate": drop, "drop_rate_whole_run": drop, "load_max_over_mean": 1.2, "dispatch_bytes": 0}
    losses = {"loss": loss, "validation_loss": loss, "validation_loss_capped": loss + drop, "device": "cpu"}
    head = {"point": point.name, "axes": point.axes, "seed": point.seed, "status": "finished", "revision": "0"}
    return head | losses | balance | sizes | counted


def measurements(rng: np.random.Generator, experts: int, drop: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for at in range(1, FRACTIONS + 1):
        place = {"fraction": at / FRACTIONS, "step": at}
        model = {"loss": 3.0, "drop_rate": drop, "step_seconds": 0.05, "validation_loss": 3.0}
        lines.append(place | {"layer": None} | model | {"validation_loss_capped": 3.1})
        for layer in range(LAYERS):
            load = rng.integers(5000, 15000, experts)
            dropped = (load * drop).astype(int)
            parts = {
                "dropped_by_place": 16,
                "dropped_by_micro_step_place": 16,
                "load_by_frequency": 8,
                "dropped_by_frequency": 8,
                "over_budget_by_pool": experts,
            }
            counts = {name: rng.integers(0, 1000, number).tolist() for name, number in parts.items()}
            own = {"layer": layer, "kind": "feed_forward", "drop_rate": drop, "entropy": 1.0}
            lines.append(place | own | {"load": load.tolist(), "dropped_by_expert": dropped.tolist()} | counts)
    return lines


if __name__ == "__main__":
    main()
