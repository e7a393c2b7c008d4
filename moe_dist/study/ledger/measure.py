"""What the ledger says of a finished point, read from its run's folder in one pass.

Losses in nats a token, of a classifier a text; a number that the run did not record is null.

| name                                | what                                                                          |
|-------------------------------------|-------------------------------------------------------------------------------|
| loss                                | of training, mean of the last 20 steps                                        |
| validation_*, test_*                | all that the run's last evaluation says, by the names of metrics.jsonl:       |
|                                     | validation_loss (dropless), bits per byte or token, a classifier's accuracy   |
|                                     | and macro-F1; with an eval_capacity_factor, what ends in _capped, which is    |
|                                     | the dropless number of a point that ends its training without a capacity      |
| drop_rate, load_max_over_mean,      | mean over the last quarter of the steps; drop_rate_whole_run: over all        |
| router_entropy                      |                                                                               |
| steps_until_few_drops               | the first by which the last 20 steps dropped less than 3% in the mean         |
| step_seconds, ..._low, ..._high     | median and quartiles over steps; evaluations and checkpoints are not in them  |
| tokens_per_second, tflops,          | medians over steps                                                            |
| tflops_executed                     |                                                                               |
| flops, flops_executed               | sums over steps: nominal, and without what was dropped (models/flops.py)      |
| dispatch_rows_bytes, dispatch_bytes | mean bytes a step that experts receive, that cross between ranks in the       |
|                                     | forward pass (train/record/metrics.py)                                        |
| tokens                              | trained on: those of steps that were applied, without padding                 |
| tokens_, sequences_per_micro_step   | that compete for capacity, over all ranks; padding left out (a mean)          |
| documents_per_micro_step            | files, records or texts that they touch, each counted once: the mean over     |
|                                     | micro-steps of the first steps (train/loop.py)                                |
| expert_capacity                     | rows that an expert takes at the end of the run, C of moe/capacity.py; of one |
|                                     | rank's tokens under capacity_scope local; a list where layers differ          |
| skipped_steps, roll_backs           | steps left out of those that the run ended with; returns to a checkpoint      |
| seconds                             | sum over steps, without start-up and evaluation                               |
| memory_bytes                        | most that a step held on rank 0                                               |
| config_hash                         | SHA-256 of the point's configuration, without where the run lies              |
| started                             | when the point first was, in UTC                                              |
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.config.rules.batch import batch_shape
from moe_dist.kernels.random import RandomKey
from moe_dist.models.parameters import ParameterCounts, classifier_parameter_counts, parameter_counts
from moe_dist.moe.capacity import Capacity, expert_capacity
from moe_dist.parallel.mesh import Group
from moe_dist.plan.kept import competing_tokens
from moe_dist.step import Site, StepContext
from moe_dist.study.design.grid import Point
from moe_dist.study.design.study_file import METRICS
from moe_dist.study.ledger.ledger import loss_unit as loss_unit
from moe_dist.study.ledger.measurements import FILE, Measurements, write_measurements
from moe_dist.study.ledger.settings import config_hash
from moe_dist.train.record.run_folder import ROLL_BACKS

_LAST_STEPS = 20
_FEW_DROPS = 0.03
Record = dict[str, Any]


def identity(point: Point) -> Record:
    """What every line of the ledger opens with."""
    return {"point": point.name, "axes": point.axes, "seed": point.seed, "seeds": point.seeds}


def measure(point: Point) -> Record:
    """The ledger's line; and writes measurements.jsonl beside the run. Raises OSError or ValueError when the run cannot
    be read."""
    config, environment = load_config(point.run / "config.yaml"), _read_json(point.run / "environment.json")
    measurements, records, sites = Measurements(config), list[Record](), list[Site]()
    for record in _records(point.run / "metrics.jsonl"):
        measurements.add(record)
        sites = [Site(row["layer"], row["kind"]) for row in record.pop("layers", [])]
        records.append(record)
    write_measurements(point.folder / FILE, measurements.lines)
    line = identity(point) | {"status": "finished", "steps": records[-1]["step"]}
    line |= _learned(config, records) | _balance(records) | _cost(records)
    line |= _sizes(config, environment, sites, records) | _setting(point, config, environment)
    return line | {
        "skipped_steps": sum("skipped" in record for record in records),
        "roll_backs": _lines_of(point.run / ROLL_BACKS),
        "run": str(point.run),
        "started": started(point),
    }


def started(point: Point) -> str:
    """point.yaml is written once, when the point first starts."""
    seconds = (point.folder / "point.yaml").stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _learned(config: Config, records: Sequence[Record]) -> Record:
    measured = {name: value for name, value in records[-1].items() if name.startswith(("validation_", "test_"))}
    if _dropless(config):
        measured = {
            f"{name}_capped": value for name, value in measured.items() if f"{name}_capped" in METRICS
        } | measured
    return {"loss": _mean(records[-_LAST_STEPS:], "loss"), "validation_loss": None, **measured}


def _dropless(config: Config) -> bool:
    """Whether nothing limits the experts at the end of training, nor in evaluations."""
    last = config.train.steps - 1
    return all(
        moe.is_dropless(moe.eval_capacity_factor) and moe.is_dropless(moe.factor_at(last))
        for moe in config.model.moe_sections
    )


def _balance(records: Sequence[Record]) -> Record:
    quarter = records[-max(1, len(records) // 4) :]
    return {
        "drop_rate": _mean(quarter, "drop_rate"),
        "drop_rate_whole_run": _mean(records, "drop_rate"),
        "steps_until_few_drops": _steps_until_few_drops(records),
        "load_max_over_mean": _mean(quarter, "load_max_over_mean"),
        "router_entropy": _mean(quarter, "router_entropy"),
    }


def _steps_until_few_drops(records: Sequence[Record]) -> int | None:
    """Steps up to the end of the first such window; None where there is none."""
    rates = np.array([record.get("drop_rate") for record in records], np.float64)  # None: NaN, which is in no window
    if len(rates) < _LAST_STEPS:
        return None
    few = sliding_window_view(rates, _LAST_STEPS).mean(-1) < _FEW_DROPS
    return int(records[few.argmax() + _LAST_STEPS - 1]["step"]) if few.any() else None


def _cost(records: Sequence[Record]) -> Record:
    seconds = [record["step_seconds"] for record in records]
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    memory = _values(records, "memory_bytes")
    return {
        "step_seconds": middle,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "tokens_per_second": _median(records, "tokens_per_second"),
        "tflops": _median(records, "tflops"),
        "tflops_executed": _median(records, "tflops_executed"),
        "flops": _total(records, "tflops", 1e12),
        "flops_executed": _total(records, "tflops_executed", 1e12),
        "dispatch_rows_bytes": _mean(records, "dispatch_rows_bytes"),
        "dispatch_bytes": _mean(records, "dispatch_bytes"),
        "memory_bytes": max(memory) if memory else None,
        "seconds": sum(seconds),
    }


def _sizes(config: Config, environment: Record, sites: Sequence[Site], records: Sequence[Record]) -> Record:
    counts = _parameter_counts(config)
    layout = environment.get("layout", {"world": 1, "dp": 1})
    shape = batch_shape(config.train, layout["dp"])
    tokens = _total(records, "tokens_per_second")
    in_micro_step = None if tokens is None else tokens / len(records) / shape.accumulation
    if in_micro_step is not None and config.task == "language_modelling":
        in_micro_step = round(in_micro_step)
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "tokens": _total([record for record in records if "skipped" not in record], "tokens_per_second"),
        "tokens_per_micro_step": in_micro_step,
        "sequences_per_micro_step": shape.micro_batch * layout["dp"],
        "documents_per_micro_step": environment.get("data", {}).get("documents_per_micro_step"),
        "expert_capacity": None if in_micro_step is None else _rows(config, sites, in_micro_step, layout["world"]),
    }


def _setting(point: Point, config: Config, environment: Record) -> Record:
    steps, evaluations = config.train.steps, config.run.evaluations
    return {
        "schedule": {"steps": steps, "warmup_steps": config.optim.warmup_steps, "evaluations": evaluations},
        "config_hash": config_hash(point.config),
        "data_digest": environment.get("data", {}).get("digest"),
        "device": environment.get("device"),
        "revision": environment.get("revision"),
        "versions": {"python": environment.get("python")} | environment.get("packages", {}),
        "machine": {
            "host": environment.get("host"),
            "cpu": environment.get("cpu"),
            "threads": environment.get("threads_per_rank"),
            "device": environment.get("device"),
        },
    }


def _rows(config: Config, sites: Sequence[Site], tokens: float, ranks: int) -> int | list[int | None] | None:
    """C of each layer with experts, or the one number that all have."""
    last = StepContext(RandomKey.of("measure"), step=config.train.steps - 1)
    rows = []
    for site in sites:
        moe = config.model.moe if site.kind == "feed_forward" else config.model.attention.moe
        factor, competing = Capacity(moe, site, Group()).factor(last), competing_tokens(moe, tokens, ranks)
        rows.append(expert_capacity(factor, moe.top_k, competing, moe.num_experts, moe.min_capacity))
    return rows if len(set(rows)) > 1 else next(iter(rows), None)


def _parameter_counts(config: Config) -> ParameterCounts:
    """config: the run's own, in which the data has said how many classes there are."""
    if config.task == "classification":
        return classifier_parameter_counts(config.model, config.train.seq_len)
    return parameter_counts(config.model)


def _records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _read_json(path: Path) -> Record:
    found: Record = json.loads(path.read_text(encoding="utf-8"))
    return found


def _lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _mean(records: Iterable[Record], name: str) -> float | None:
    values = _values(records, name)
    return fmean(values) if values else None


def _median(records: Iterable[Record], name: str) -> float | None:
    values = _values(records, name)
    return float(np.median(values)) if values else None


def _total(records: Iterable[Record], name: str, unit: float = 1.0) -> int | None:
    """Of something that is recorded a second: its sum over steps. What a step does is a whole number."""
    values = [record[name] * unit * record["step_seconds"] for record in records if record.get(name) is not None]
    return sum(map(round, values)) if values else None
