"""What the ledger says of a finished point, read from its run's folder."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.models.parameters import ParameterCounts, classifier_parameter_counts, parameter_counts
from moe_dist.study.grid import Point
from moe_dist.study.ledger import loss_unit as loss_unit

_LAST_STEPS = 20


def identity(point: Point) -> dict[str, Any]:
    """What every line of the ledger opens with."""
    return {"point": point.name, "axes": point.axes, "seed": point.seed}


def measure(point: Point) -> dict[str, Any]:
    """The ledger's line. Losses in nats a token, of a classifier a text; a number that the run did not record is null.

    loss: training, mean of the last 20 steps. validation_*, test_*: all that the run's last evaluation says, under the
    names of metrics.jsonl: validation_loss (dropless), bits per byte or token, a classifier's accuracy and macro-F1;
    with an eval_capacity_factor, what ends in _capped. drop_rate and load_max_over_mean: mean over the last quarter of
    the steps; drop_rate_whole_run: over all of them. step_seconds and tokens_per_second: medians over steps.
    dispatch_rows_bytes, dispatch_bytes: mean bytes a step that the experts receive, and that cross between ranks in the
    forward pass (train/record/metrics.py). seconds: sum over steps, without start-up and evaluation. started: when the
    point first was, in UTC.
    """
    records = [json.loads(line) for line in (point.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    environment = json.loads((point.run / "environment.json").read_text(encoding="utf-8"))
    quarter = records[-max(1, len(records) // 4) :]
    counts = _parameter_counts(load_config(point.run / "config.yaml"))
    measured = {name: value for name, value in records[-1].items() if name.startswith(("validation_", "test_"))}
    return identity(point) | {
        "status": "finished",
        "steps": records[-1]["step"],
        "loss": _mean(records[-_LAST_STEPS:], "loss"),
        "validation_loss": None,
        **measured,
        "drop_rate": _mean(quarter, "drop_rate"),
        "drop_rate_whole_run": _mean(records, "drop_rate"),
        "load_max_over_mean": _mean(quarter, "load_max_over_mean"),
        "step_seconds": median(record["step_seconds"] for record in records),
        "tokens_per_second": median(record["tokens_per_second"] for record in records),
        "dispatch_rows_bytes": _mean(records, "dispatch_rows_bytes"),
        "dispatch_bytes": _mean(records, "dispatch_bytes"),
        "parameters": counts.total,
        "active_parameters": counts.active,
        "run": str(point.run),
        "started": started(point),
        "seconds": sum(record["step_seconds"] for record in records),
        "device": environment.get("device"),
        "revision": environment.get("revision"),
    }


def started(point: Point) -> str:
    """point.yaml is written once, when the point first starts."""
    seconds = (point.folder / "point.yaml").stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _parameter_counts(config: Config) -> ParameterCounts:
    """config: the run's own, in which the data has said how many classes there are."""
    if config.task == "classification":
        return classifier_parameter_counts(config.model, config.train.seq_len)
    return parameter_counts(config.model)


def _mean(records: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return fmean(values) if values else None
