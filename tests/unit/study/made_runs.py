"""Run folders made by hand, with what a run writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Change = Callable[[int], dict[str, Any]]

ENVIRONMENT = {
    "packages": {"torch": "2.13.0+cpu", "apex": None},
    "device": "cpu (x86_64)",
    "layout": {"world": 1, "ep": 1},
    "revision": "abc1234",
    "data": {"name": "made-by-hand", "tokens": {"train": 1000, "validation": 100}},
}


def write_run(
    folder: Path,
    steps: int = 40,
    *,
    config: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    experts: int = 4,
    evaluate_every: int | None = 10,
    state: str = "finished",
    of_step: Change = lambda step: {},
) -> Path:
    """experts: 0 for a dense model. of_step: what to add to a step's record, or to put in its place."""
    folder.mkdir(parents=True)
    values = {
        "task": "language_modelling",
        "model": {"vocab_size": 256, "moe": {"num_experts": experts, "capacity_factor": 1.0}},
        "data": {"kind": "stdlib", "paths": []},
        "train": {"steps": 40, "seq_len": 64, "global_batch": 32, "seed": 0},
        "run": {"name": folder.name, "root": str(folder.parent), "eval_sequences": 256},
    }
    for key, value in (config or {}).items():
        *sections, name = key.split(".")
        section: Any = values
        for each in sections:
            section = section[each]
        section[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | (environment or {})))
    (folder / "status.json").write_text(json.dumps({"state": state, "step": steps}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = record_of(step, experts)
            if evaluate_every is not None and step % evaluate_every == 0:
                record |= {"validation_loss": 2.0 + 2 / step, "validation_bits_per_byte": 3.0 + 2 / step}
            file.write(json.dumps(record | of_step(step)) + "\n")
    return folder


def record_of(step: int, experts: int) -> dict[str, Any]:
    record = {"step": step, "loss": 2.0 + 3 / step, "step_seconds": 0.2, "tokens_per_second": 10240.0}
    record |= {"tflops": 0.5, "memory_bytes": 500_000_000}
    if experts:
        load = [2048 - 1024] + [1024] * (experts - 2) + [2048]
        rows = [{"layer": layer, "kind": "feed_forward", "load": load} for layer in (0, 1)]
        record |= {"drop_rate": 0.5 / step, "load_max_over_mean": 2.0, "layers": rows}
    return record
