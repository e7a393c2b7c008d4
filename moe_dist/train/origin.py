"""`train.init_from`: a new run that begins with the weights of another one.

Weights alone: the optimizer has made no step, and data, schedule and layout are the new run's. What may differ between
the two models:

| setting                                              | differs                                               |
|------------------------------------------------------|-------------------------------------------------------|
| capacity, dropping, dropout, jitter, loss weights,   | freely                                                |
| backends, kernels, dispatch, recomputation           |                                                       |
| other options of MoE layers that leave parameters as | and is noted: the same weights compute something else |
| they are (top_k, routed_scale, router, balance, ...) |                                                       |
| scaling of rotary positions                          | and is noted                                          |
| anything else                                        | is refused, each difference by its name               |

State of routers that is no parameter, such as a balancing bias, is taken over where both have it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.find import run_of, whole_checkpoint
from moe_dist.checkpoint.layout import MANIFEST, Manifest
from moe_dist.checkpoint.reshard import other_parameters
from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.config.model import ModelConfig
from moe_dist.config.parse import parse_dict
from moe_dist.config.rules.parts import shown
from moe_dist.config.values import user_path
from moe_dist.models.trainable import Trainable
from moe_dist.train.agreement import leaves

RECORD = "init_from.json"
"""In the run's folder: which checkpoint it began with."""
_FREELY = frozenset(
    "backend kernels recompute dispatch wire wire_dtype overlap_chunks experts cpu_products over_budget "
    "capacity_factor eval_capacity_factor capacity_schedule min_capacity capacity_pool pool_floor capacity_scope "
    "drop_policy drop_order overflow dropout token_dropout jitter balance_loss_coef z_loss_coef "
    "importance_loss_coef load_loss_coef balance_scope bias_update_rate balance_bins balance_ema".split()
)
_SHOWN = 4


@dataclass(frozen=True)
class Origin:
    """A whole checkpoint whose weights fit. notes: what computes otherwise than there, a line each."""

    checkpoint: Path
    step: int
    notes: tuple[str, ...]

    def record(self) -> str:
        """For RECORD, as JSON."""
        digest = hashlib.sha256((self.checkpoint / MANIFEST).read_bytes()).hexdigest()
        where = str(self.checkpoint.resolve())
        return json.dumps({"checkpoint": where, "step": self.step, "manifest": digest, "notes": self.notes}, indent=1)


def find_origin(config: Config, tokenizer: str, model: Trainable, say: Callable[[str], None]) -> Origin:
    """What `config.train.init_from` names: a run, for its newest whole checkpoint, or one checkpoint.

    config: with the model as it is built. tokenizer: which one, as `Task.tokenizer` says it. say: takes a line on each
    checkpoint that is damaged and passed over. Every rank must call. Raises ValueError where there is none, and where
    it is of another model.
    """
    assert config.train.init_from is not None
    path = user_path(config.train.init_from)
    checkpoint = whole_checkpoint(path, say)
    manifest = Manifest.load(checkpoint)
    there = _config_of(checkpoint, manifest)
    refused, noted = compare(there, config)
    others, buffers = other_parameters(manifest, model), _router_state(model) | set(manifest.buffers)
    unlike = [problem for name, problem in others.items() if name not in buffers]
    if unlike:
        refused = [*refused, *noted, *unlike[:_SHOWN]]
        refused += [f"and {len(unlike) - _SHOWN} more parameters"] * (len(unlike) > _SHOWN)
    if refused:
        raise ValueError(
            f"train.init_from={path}: {checkpoint} holds another model: {'; '.join(refused)}; take these settings from "
            "its run, or change its experts with `moe-dist experts`"
        )
    notes = [f"{difference}: the same weights, computed with otherwise" for difference in noted]
    notes += [
        f"{problem}: {'it begins anew' if name not in manifest.shapes else 'it is left out'}"
        for name, problem in others.items()
    ]
    trained_with = manifest.run.get("tokenizer", tokenizer)
    if trained_with != tokenizer:
        notes.append(f"the tokenizer is {tokenizer[:12]}, there {trained_with[:12]}: ids mean other texts")
    return Origin(checkpoint, manifest.step, tuple(notes))


def compare(there: Config, here: Config) -> tuple[list[str], list[str]]:
    """(differences of the models that make weights unfit, those that do not but change what is computed)."""
    before, after = leaves(_relevant(there.model)), leaves(_relevant(here.model))
    refused: list[str] = []
    noted: list[str] = []
    if there.task != here.task:
        refused.append(f"task={there.task} there, {here.task} here")
    for name in before | after:
        one, other = before.get(name), after.get(name)
        if one == other or set(name.split(".")) & _FREELY:
            continue
        line = f"model.{name}={shown(one)} there, {shown(other)} here"
        mild = "moe." in f"{name}." or name.rpartition(".")[2].startswith("rope_")
        (noted if mild else refused).append(line)
    return refused, noted


def _relevant(model: ModelConfig) -> dict[str, Any]:
    """Its settings, as JSON has them, without sections that it does not look at."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(replace(model, head_dim=model.head_width))))
    if model.moe.num_experts == 0:
        values["moe"] = {"num_experts": 0}
    attention = values["attention"]
    for section, kind in (("moe", "switch"), ("routed", "routed")):
        if model.attention.kind != kind:
            del attention[section]
    return values


def _config_of(checkpoint: Path, manifest: Manifest) -> Config:
    """Of the run that wrote it: what the checkpoint itself says, else config.yaml of its folder."""
    said: dict[str, Any] = {name: manifest.config[name] for name in ("task", "model") if name in manifest.config}
    return parse_dict(said, str(checkpoint)) if "model" in said else load_config(run_of(checkpoint) / "config.yaml")


def _router_state(model: Trainable) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def opening_of(origin: Origin) -> Iterator[str]:
    """What a person is told."""
    yield (
        f"begins    with the weights of {origin.checkpoint}, step {origin.step}; step, optimizer and data begin anew"
    )
    yield from (f"note      {note}" for note in origin.notes)
