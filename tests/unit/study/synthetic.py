"""Studies with a planted truth on disk: a study's file, a ledger and measurements as the runner writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.study.design.grid import Point, Study, load_study
from moe_dist.study.ledger.measurements import FILE, write_measurements
from moe_dist.study.ledger.settings import config_hash

Loss = Callable[[Point, np.random.Generator], float]
QUESTION = """
question:
  baseline: {model.moe.capacity_factor: null}
  smallest_difference: 0.01
  decide_by: time
"""
STUDY = """
name: planted
base: base.yaml
overrides: {train.steps: 100}
axes:
  model.moe.capacity_factor: [0.5, 1.0, null]
seeds: [0, 1, 2, 3, 4]
"""


def planted_study(folder: Path, text: str = STUDY + QUESTION) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text("train: {seq_len: 32}\noptim: {warmup_steps: 2}\n")
    path = folder / "study.yaml"
    path.write_text(text + f"root: {folder}/root\n")
    return load_study(path)


def planted_losses(
    effects: dict[float | None, float], seed: int = 0, own: float = 0.002, shared: float = 0.05, base: float = 3.0
) -> Loss:
    """base + effect of the capacity factor + what all points of a seed share + each point's own noise."""
    rng = np.random.default_rng(seed)
    common = shared * rng.standard_normal(100)

    def loss(point: Point, rng: np.random.Generator) -> float:
        factor = point.config.model.moe.capacity_factor
        assert not isinstance(factor, list)
        return float(base + effects[factor] + common[point.seed] + own * rng.standard_normal())

    return loss


def record_of(point: Point, loss: float, **changes: Any) -> dict[str, Any]:
    """A finished point's line."""
    config = point.config
    factor = config.model.moe.capacity_factor
    capped = factor is not None
    steps = config.train.steps
    record = {
        "point": point.name,
        "axes": point.axes,
        "seed": point.seed,
        "seeds": {"weights": point.seed, "data": point.seed},
        "status": "finished",
        "attempt": 1,
        "steps": steps,
        "loss": loss - 0.1,
        "validation_loss": loss,
        "validation_loss_capped": loss + (0.03 if capped else 0.0),
        "validation_bits_per_byte": loss / 0.7,
        "drop_rate": 0.1 if capped else 0.0,
        "drop_rate_whole_run": 0.12 if capped else 0.0,
        "load_max_over_mean": 1.5,
        "router_entropy": 1.2,
        "expert_capacity": 64 if capped else None,
        "tokens_per_micro_step": 512,
        "sequences_per_micro_step": 16,
        "documents_per_micro_step": 4.0,
        "tokens": steps * 512,
        "flops": 1e9 * steps,
        "flops_executed": 1.1e9 * steps,
        "tflops": 0.01,
        "tflops_executed": 0.011,
        "memory_bytes": 2**28,
        "step_seconds": 0.1 if capped else 0.12,
        "step_seconds_low": 0.09,
        "step_seconds_high": 0.13,
        "tokens_per_second": 512 / (0.1 if capped else 0.12),
        "dispatch_rows_bytes": 1e6,
        "dispatch_bytes": 0.0,
        "parameters": 1000,
        "active_parameters": 500,
        "seconds": 0.1 * steps,
        "skipped_steps": 0,
        "roll_backs": 0,
        "schedule": {"steps": steps, "warmup_steps": 2, "evaluations": 4},
        "config_hash": config_hash(config),
        "data_digest": "d0",
        "versions": {"torch": "2.9", "moe_dist": "1"},
        "machine": {"host": "h", "cpu": "c", "threads": 2, "device": "cpu"},
        "run": str(point.run),
        "started": "2026-01-01T00:00:00+00:00",
        "device": "cpu",
        "revision": "abc",
    }
    return record | changes


def plant(study: Study, loss: Loss, seed: int = 0, change: Callable[[Point], dict[str, Any]] | None = None) -> None:
    """Writes the whole ledger. change: what a point's line says otherwise."""
    rng = np.random.default_rng(seed)
    study.folder.mkdir(parents=True, exist_ok=True)
    lines = [record_of(point, loss(point, rng), **(change(point) if change else {})) for point in study.points]
    study.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))


def plant_measurements(
    point: Point, layers: int, experts: int, fractions: int, seed: int = 0, drop: float = 0.1
) -> list[dict[str, Any]]:
    """Writes a point's measurements.jsonl, and returns its lines."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for at in range(1, fractions + 1):
        head = {"fraction": at / fractions, "step": round(point.config.train.steps * at / fractions)}
        model = {"layer": None, "loss": 3.0, "validation_loss": 3.1, "validation_loss_capped": 3.2, "drop_rate": drop}
        lines.append(head | model | {"router_entropy": 1.0, "load_max_over_mean": 1.5, "step_seconds": 0.1})
        for layer in range(layers):
            load = rng.integers(500, 1500, experts)
            dropped = rng.binomial(load, drop)
            by_frequency = rng.multinomial(int(load.sum()), [1 / 8] * 8)
            line = {
                "layer": layer,
                "kind": "feed_forward",
                "drop_rate": float(dropped.sum() / load.sum()),
                "entropy": 1.0,
                "load": load.tolist(),
                "dropped_by_expert": dropped.tolist(),
                "dropped_by_place": rng.multinomial(int(dropped.sum()), [1 / 16] * 16).tolist(),
                "dropped_by_micro_step_place": rng.multinomial(int(dropped.sum()), [1 / 16] * 16).tolist(),
                "load_by_frequency": by_frequency.tolist(),
                "dropped_by_frequency": rng.binomial(by_frequency, drop).tolist(),
                "over_budget_by_pool": dropped.tolist(),
            }
            lines.append(head | line)
    point.folder.mkdir(parents=True, exist_ok=True)
    write_measurements(point.folder / FILE, lines)
    return lines
