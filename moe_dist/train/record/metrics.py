"""What a run writes down: one JSON line a step in metrics.jsonl, and the same numbers for TensorBoard and wandb.

metrics.jsonl is the record: strict JSON, flushed line by line, rewound to the checkpoint on resume, so that a run
killed anywhere ends with exactly one line for each step. The others are views of it.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_dist.config import Config
from moe_dist.disk import lines_backwards
from moe_dist.moe.losses import MoEStats
from moe_dist.train.record.board import Board
from moe_dist.train.record.effective_time import kept_seconds
from moe_dist.train.record.wandb_board import WandbBoard


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
    that no expert took, mean over layers. over_budget_rows: asked for beyond the limits, before rerouting, over all
    layers.

    Where drops happen: each layer has dropped_by_expert (whom the router chose), dropped_by_place (16 parts of the
    sequence, from its start to its end), dropped_by_micro_step_place (16 parts of the micro-step), dropped_by_frequency
    (8 classes of tokens, the rarest first: data/frequency.py; load_by_frequency: all assignments by the same) and
    over_budget_by_pool, in assignments of the whole step.
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
            "dropped_by_expert": layer.dropped_E.tolist(),
            "dropped_by_place": layer.dropped_S.tolist(),
            "dropped_by_micro_step_place": layer.dropped_M.tolist(),
            "dropped_by_frequency": layer.dropped_F.tolist(),
            "load_by_frequency": layer.load_F.tolist(),
            "over_budget_by_pool": layer.over_P.tolist(),
        }
        for layer in layers
    ]
    return {
        "drop_rate": _drop_rate(layers),
        "unserved_rate": _mean(layer.unserved for layer in layers),
        "over_budget_rows": sum(int(layer.over_P.sum()) for layer in layers),
        "load_max_over_mean": max(row["load_max_over_mean"] for row in rows),
        "balance_loss": _mean(layer.balance_loss for layer in layers),
        "z_loss": _mean(layer.z_loss for layer in layers),
        "router_entropy": _mean(layer.entropy for layer in layers),
        "dispatch_rows_bytes": sum(int(layer.kept_E.sum()) for layer in layers) * row_bytes,
        "dispatch_bytes": sum(layer.sent_bytes for layer in layers),
        "layers": rows,
    }


class MetricsWriter:
    """Appends records to run_dir/metrics.jsonl and, if asked, to run_dir/tensorboard and wandb. For rank 0 only.

    A last line torn by a kill is removed on opening. Use `rewind` before logging when a run resumes.
    `histogram_every`: steps between TensorBoard histograms of the experts' load; metrics.jsonl has it every step.
    say: takes a line for the person who watches.
    """

    def __init__(
        self,
        run_dir: Path,
        tensorboard: bool,
        *,
        wandb: WandbBoard | None = None,
        histogram_every: int = 10,
        say: Callable[[str], None] = print,
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._board = Board(run_dir / "tensorboard", histogram_every, say) if tensorboard else None
        self._wandb = wandb
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open(last_step=math.inf)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record, which must have the key "step", as one line; where it has step_seconds, with kept_seconds:
        those of all steps so far that were applied.

        A number that is not finite is written as null, and its name is listed under "nonfinite".
        """
        if "step" not in record:
            raise ValueError(f'a record needs the key "step", got {sorted(record)}')
        if "step_seconds" in record:
            self._kept += 0.0 if "skipped" in record else record["step_seconds"]
            record = record | {"kept_seconds": self._kept}
        nonfinite: list[str] = []
        clean = _finite(record, "", nonfinite)
        if nonfinite:
            clean["nonfinite"] = nonfinite
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.log(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def sync(self) -> None:
        """Force everything logged onto the disk. Call it before a checkpoint of the same step is committed."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def rewind(self, step: int) -> None:
        """Forget all records after `step`, as if the run had just logged it. 0 forgets a whole run."""
        self._close()
        self._open(last_step=step)

    def close(self) -> None:
        self._close()
        if self._wandb is not None:
            self._wandb.close()

    def _close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _open(self, last_step: float) -> None:
        _trim(self._path, last_step)
        self._kept = kept_seconds(self._path.parent)
        self._file = self._path.open("a", encoding="utf-8")
        if self._board is not None:
            self._board.begin(None if last_step == math.inf else int(last_step))
        if self._wandb is not None:
            self._wandb.begin()


def open_metrics(config: Config, run_dir: Path, say: Callable[[str], None]) -> MetricsWriter:
    """As `config.run` says."""
    run, wandb = config.run, None
    if run.wandb is not None:
        wandb = WandbBoard(run_dir, run.wandb, run.name, json.loads(json.dumps(asdict(config))), say)
    return MetricsWriter(run_dir, run.tensorboard, wandb=wandb, say=say)


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
    """Cut off the lines with a later step, and a torn last line. Reads no more of the file than these, and one."""
    if not path.exists():
        return
    size, end, torn = path.stat().st_size, 0, True  # end: of what stays
    for start, line in lines_backwards(path):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if not torn:  # only the last line can be what a process died over
                raise ValueError(f"{path}, byte {start}: not a JSON record: {line[:80]!r}") from None
        else:
            if step <= last_step:
                end = start + len(line)
                break
        torn = False
    if end + 1 == size or end == size == 0:
        return
    with path.open("rb+") as file:
        file.truncate(end + 1 if end else 0)  # in one move: a kill leaves all of the old lines or all of the new ones
        file.seek(end)
        file.write(b"\n" if end else b"")  # already there, but of a last line that was torn just before it
        file.flush()
        os.fsync(file.fileno())
