"""What a run writes down: one JSON line a step in metrics.jsonl, and the same numbers for TensorBoard.

metrics.jsonl is the record: strict JSON, flushed line by line, rewound to the checkpoint on resume, so that a run
killed anywhere ends with exactly one line for each step. TensorBoard is a view of it.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_dist.moe.losses import MoEStats

SYSTEM = frozenset("tokens_per_second step_seconds tflops mfu tflops_executed mfu_executed memory_bytes".split())
_MOE = frozenset(
    "drop_rate unserved_rate load_max_over_mean balance_loss z_loss router_entropy "
    "dispatch_rows_bytes dispatch_bytes".split()
)


def moe_record(layers: Sequence[MoEStats], row_bytes: int) -> dict[str, Any]:
    """The MoE part of a step's record; empty for a model without MoE layers.

    layers: of a whole step, over all ranks. drop_rate = 1 - sum(kept) / sum(load) over all layers; load_max_over_mean
    is that of the worst layer; balance_loss, z_loss and router_entropy are means over layers. `layers` has the same for
    each layer. Where all tokens were padding, nothing is dropped, and all loads are equal.

    With `row_bytes`, the bytes of one token's activation (d_model * element size), over all ranks, layers and
    micro-steps: dispatch_rows_bytes is what the experts receive (of attention experts, what becomes queries), kept *
    row_bytes, the same in every layout.
    dispatch_bytes is what the dispatcher sends between ranks in the forward pass, there and back, padding included: 0
    at ep = 1. The backward pass moves as much again. The exchanged counts are not in it. unserved_rate: share of tokens
    that no expert took, mean over layers.
    """
    if not layers:
        return {}
    rows: list[dict[str, Any]] = [
        {
            "layer": layer.site.layer,
            "kind": layer.site.kind,
            "drop_rate": _drop_rate([layer]),
            "unserved_rate": float(layer.unserved),
            "load_max_over_mean": _max_over_mean(layer.load_E.tolist()),
            "entropy": float(layer.entropy),
            "load": layer.load_E.tolist(),
        }
        for layer in layers
    ]
    return {
        "drop_rate": _drop_rate(layers),
        "unserved_rate": _mean(layer.unserved for layer in layers),
        "load_max_over_mean": max(row["load_max_over_mean"] for row in rows),
        "balance_loss": _mean(layer.balance_loss for layer in layers),
        "z_loss": _mean(layer.z_loss for layer in layers),
        "router_entropy": _mean(layer.entropy for layer in layers),
        "dispatch_rows_bytes": sum(int(layer.kept_E.sum()) for layer in layers) * row_bytes,
        "dispatch_bytes": sum(layer.sent_bytes for layer in layers),
        "layers": rows,
    }


class MetricsWriter:
    """Appends records to run_dir/metrics.jsonl and, if asked, to run_dir/tensorboard. For rank 0 only.

    A last line torn by a kill is removed on opening. Use `rewind` before logging when a run resumes.
    `histogram_every`: steps between TensorBoard histograms of the experts' load; metrics.jsonl has it every step.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, *, histogram_every: int = 10) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._histogram_every = histogram_every
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open(last_step=math.inf)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record, which must have the key "step", as one line.

        A number that is not finite is written as null, and its name is listed under "nonfinite".
        """
        if "step" not in record:
            raise ValueError(f'a record needs the key "step", got {sorted(record)}')
        nonfinite: list[str] = []
        clean = _finite(record, "", nonfinite)
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._log_board(record)

    def sync(self) -> None:
        """Force everything logged onto the disk. Call it before a checkpoint of the same step is committed."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def rewind(self, step: int) -> None:
        """Forget all records after `step`, as if the run had just logged it. 0 forgets a whole run."""
        self.close()
        self._open(last_step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _open(self, last_step: float) -> None:
        _trim(self._path, last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: the import takes seconds

            purge_step = None if last_step == math.inf else int(last_step) + 1  # the first step to hide
            self._board = SummaryWriter(self._run_dir / "tensorboard", purge_step=purge_step, flush_secs=10)

    def _log_board(self, record: dict[str, Any]) -> None:
        assert self._board is not None
        step = record["step"]
        for tag, value in board_scalars(record):
            self._board.add_scalar(tag, value, step)
        if step % self._histogram_every == 0:
            for layer in record.get("layers", []):
                self._log_load(f"{_tag(layer)}/load", layer["load"], step)

    def _log_load(self, tag: str, load_E: list[int], step: int) -> None:
        """A bar for each expert, as high as its load."""
        assert self._board is not None
        self._board.add_histogram_raw(
            tag,
            min=0,
            max=len(load_E),
            num=sum(load_E),
            sum=sum(expert * load for expert, load in enumerate(load_E)),
            sum_squares=sum(expert**2 * load for expert, load in enumerate(load_E)),
            bucket_limits=list(range(1, len(load_E) + 1)),
            bucket_counts=load_E,
            global_step=step,
        )


def last_logged_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl has whole; 0 for none."""
    path = run_dir / "metrics.jsonl"
    for line in reversed(path.read_bytes().split(b"\n")) if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # a torn last line
            return int(json.loads(line)["step"])
    return 0


def recent_losses(run_dir: Path, count: int) -> list[float]:
    """Losses of the last `count` steps in metrics.jsonl that were applied."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    applied = (record for record in map(json.loads, lines) if "skipped" not in record)
    return [record["loss"] for record in applied if record.get("loss") is not None][-count:]


def board_scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The TensorBoard tag and value of each number in a record."""
    for name, value in record.items():
        if name == "step" or not isinstance(value, int | float):
            continue
        split, _, what = name.partition("_")
        if split in ("validation", "test"):
            yield f"{split}/{what}", value
        elif name in SYSTEM:
            yield f"system/{name}", value
        else:
            yield f"{'moe' if name in _MOE else 'train'}/{name}", value
    for layer in record.get("layers", []):
        for name in ("drop_rate", "load_max_over_mean", "entropy"):
            yield f"{_tag(layer)}/{name}", layer[name]


def _tag(row: dict[str, Any]) -> str:
    """Of a row of `layers`: a block can have experts in its feed-forward and in its attention."""
    return f"moe/{'attention' if row['kind'] == 'attention' else 'layer'}_{row['layer']}"


def _mean(values: Iterator[Tensor]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)


def _max_over_mean(load_E: list[int]) -> float:
    return max(load_E) * len(load_E) / sum(load_E) if any(load_E) else 1.0


def _drop_rate(layers: Sequence[MoEStats]) -> float:
    load = sum(int(layer.load_E.sum()) for layer in layers)
    kept = sum(int(layer.kept_E.sum()) for layer in layers)
    assert 0 <= kept <= load, f"{kept} assignments kept of {load}"
    return (load - kept) / load if load else 0.0


def _finite(value: Any, name: str, nonfinite: list[str]) -> Any:
    """A copy with null for each number that is not finite; their dotted names are appended to `nonfinite`."""
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else key, nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


def _trim(path: Path, last_step: float) -> None:
    """Remove the lines with a later step, and a torn last line, in one atomic replacement."""
    if not path.exists():
        return
    before = path.read_bytes()
    lines = before.removesuffix(b"\n").split(b"\n") if before else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # the process died while writing it
                break
            raise ValueError(f"{path}, line {number}: not a JSON record: {line[:80]!r}") from None
        if record["step"] <= last_step:
            kept.append(line + b"\n")
    after = b"".join(kept)
    if after == before:
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
