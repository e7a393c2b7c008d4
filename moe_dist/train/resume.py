"""What a run goes on from, and what it must agree on with it.

A resumed run repeats nothing and leaves nothing out only if it reads the same data in the same order into the same
model. Whoever wants something else on purpose names it: `--override seed`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from moe_dist.checkpoint.layout import Manifest
from moe_dist.checkpoint.reshard import newest_told
from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.config.model import ModelConfig
from moe_dist.train.record.run_folder import RunFolder
from moe_dist.train.tasks.task import Task

Resume = Literal["never", "auto", "must"]

OVERRIDES = {
    "data": "other data: steps go on counting, and read what the new data has at their place",
    "tokenizer": "another tokenizer, under which ids mean other texts",
    "seed": "another seed: another order of the data from here on, unless data_seed names it",
    "data_seed": "another seed of the data's order",
    "seq_len": "sequences of another length, so another order of the data",
    "global_batch": "another number of sequences a step, so another order of the data",
    "model": "another model: parameters with another shape or name, and their moments, begin anew",
}
"""What may be overridden, and what that does."""


_HOW = frozenset(
    "backend kernels norm_kernels recompute dispatch wire wire_dtype overlap_chunks experts cpu_products "
    "eval_capacity_factor over_budget".split()
)
_NOT_THE_MODEL = _HOW | {"num_experts", "d_ff", "num_groups"}


def identity(config: Config, task: Task) -> dict[str, Any]:
    """What a continued run must agree on, by the names of OVERRIDES. Not part of it: where and how something is
    computed, and what `moe-dist experts` changes, whose shapes are compared with the checkpoint's."""
    train = config.train
    return {
        "data": task.digest,
        "tokenizer": task.tokenizer,
        "seed": train.seed,
        "data_seed": None if train.order_seed == train.seed else train.order_seed,  # as in checkpoints older than it
        "seq_len": train.seq_len,
        "global_batch": train.global_batch,
        "model": _model_settings(config.model),
    }


def as_configured(folder: Path, config: Config) -> bool:
    """Whether config.yaml in `folder` names the same data, seed and model, so that a run that has finished there is
    this one. Where it cannot be read, no; where there is none, nothing speaks against it."""

    def settings(of: Config) -> dict[str, Any]:
        values = asdict(of)
        train = {name: values["train"][name] for name in ("seed", "data_seed", "seq_len", "global_batch")}
        return {"data": values["data"], "model": _without(values["model"], _HOW), **train}

    path = folder / "config.yaml"
    try:
        return not path.exists() or settings(load_config(path)) == settings(config)
    except (OSError, ValueError):
        return False


def checkpoint_to_continue(
    folder: RunFolder, resume: Resume, mine: dict[str, Any], override: Sequence[str], say: Callable[[str], None]
) -> Path | None:
    """What a run starts from: the newest whole checkpoint, or None for a new run. Nothing is written.

    resume: `never` wants an unused folder, `must` a checkpoint; `auto` continues where there is one and starts anew
    where there is none. mine: the identity of the run that wants to continue. override: names that may differ. Raises
    ValueError when that is not so, when all checkpoints are damaged, or the checkpoint is of another run.
    """
    if resume == "never":
        folder.refuse_second_start()
        return None
    newest = newest_told(folder.checkpoints, say)
    if newest is None and resume == "auto":
        return None
    if newest is None:
        raise ValueError(f"{folder.checkpoints} holds no complete checkpoint to resume from: start without --resume")
    run = Manifest.load(newest).run
    run["model"] = _completed(run.get("model"), _model_settings(ModelConfig()))
    differ = [name for name, value in mine.items() if run.get(name) != value]
    refused = [name for name in differ if name not in override]
    if refused:
        raise ValueError(
            f"{newest} was trained with "
            + "; ".join(_difference(name, run.get(name), mine[name]) for name in refused)
            + ": a resumed run must continue on the same data in the same order; to change that on purpose: --override "
            + ",".join(differ)
        )
    for name in differ:
        say(f"overridden: {_difference(name, run.get(name), mine[name])}")
    return newest


def _model_settings(model: ModelConfig) -> Any:
    return _without(json.loads(json.dumps(asdict(model))), _NOT_THE_MODEL)  # with keys as read back


def _completed(there: Any, default: Any) -> Any:
    """What a checkpoint says of the model, with the defaults of options that are younger than it."""
    if not (isinstance(there, dict) and isinstance(default, dict)):
        return there
    return default | {name: _completed(value, default.get(name)) for name, value in there.items()}


def _without(values: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


def _difference(name: str, there: Any, here: Any) -> str:
    """Of the model only the keys that differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
        return ", ".join(_difference(f"{name}.{key}", there.get(key), here.get(key)) for key in sorted(keys))
    return f"{name}={there}, not {here}"
