"""`moe-dist experts`: change the experts of a trained model, from one checkpoint to another, on one process.

The run's model is built here whole, three times: for its weights and for the two Adam moments, which go through the
same surgery (layers.py, models.py) and by the rules of moments.py. What comes out is a run folder with one checkpoint,
of the same step, that `moe-dist train OUTPUT/config.yaml --resume` continues in any layout.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moe_dist.checkpoint.find import run_config, run_of, whole_checkpoint
from moe_dist.checkpoint.reshard import Reader
from moe_dist.config import Config
from moe_dist.config.flags import override_config
from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.rules.run import run_rules
from moe_dist.engine.base import Kind
from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.launch import rank_from_environment
from moe_dist.surgery.arguments import Which, numbers, parse_which
from moe_dist.surgery.checkpoints import Models, changed_config, read_model, read_models, write_run
from moe_dist.surgery.layers import (
    add_experts,
    close_experts,
    merge_experts,
    open_experts,
    remove_experts,
    split_experts,
)
from moe_dist.surgery.listing import describe_layer
from moe_dist.surgery.measure import Loads, Yardstick, recorded_loads
from moe_dist.surgery.members import open_experts_of
from moe_dist.surgery.models import before_cutting, change_experts, upcycle_decoder
from moe_dist.surgery.moments import POWERS, of_added, of_copies, of_merged, said_of, split_carried, zero


def experts(own: argparse.Namespace) -> int:
    """own: of experts_arguments. Returns the exit code. Raises ValueError for what a user got wrong."""
    rank = rank_from_environment(os.environ)
    if rank.world != 1:
        raise ValueError(f"this is rank {rank.rank} of {rank.world}: run moe-dist experts on its own, without torchrun")
    config = run_config(own.run)
    if own.action != "list":
        refuse(run_rules(changed_config(config, config.model.moe, own.output).run, config.train.steps))
    checkpoint = whole_checkpoint(own.run, lambda line: print(line, file=sys.stderr))
    if own.action == "list":
        print("\n".join(describe(own, config, checkpoint)))
        return 0
    _say(config, checkpoint)
    yardstick = None if own.no_loss else _yardstick(config)
    reader = Reader(checkpoint)
    models, how = read_models(config, reader), said_of(own.action, own.moments)
    if reader.manifest.kinds == ["weight"]:
        how = "none in this checkpoint: all begin at 0"
    before = None if yardstick is None else yardstick.measure(models["weight"])
    loads = before.loads if before is not None else recorded_loads(run_of(checkpoint))[0]
    models = upcycled(own, config, models) if own.action == "upcycle" else changed(own, config, models, loads)
    print(f"moments   {how}")
    if yardstick is not None and before is not None:
        after = yardstick.measure(models["weight"])
        what = f"nats/{yardstick.unit} on {yardstick.describe()}, nothing dropped"
        print(f"loss      {before.loss:.6f} before, {after.loss:.6f} after; {what}")
    new = changed_config(config, models["weight"].config.moe, own.output)
    write_run(models, new, checkpoint, rank)
    for line in _what_next(new, checkpoint.name):
        print(line)
    return 0


def describe(own: argparse.Namespace, config: Config, checkpoint: Path) -> Iterator[str]:
    """`list`."""
    model = read_model(config, Reader(checkpoint), "weight")
    loads, steps = ({}, 0) if own.evaluate else recorded_loads(run_of(checkpoint))
    source = f"the last {steps} steps of metrics.jsonl"
    if own.evaluate:
        yardstick = _yardstick(config)
        measured = yardstick.measure(model)
        loads, source = measured.loads, f"{yardstick.describe()}; loss {measured.loss:.4f} nats/{yardstick.unit}"
    yield f"{checkpoint}: loads from {source}" if loads else f"{checkpoint}: no loads on record; --evaluate counts them"
    lines: list[str] = []
    change_experts(
        model, lambda layer: lines.extend(describe_layer(layer, loads.get(layer.layer), own.starved, own.alike))
    )
    yield from lines


def upcycled(own: argparse.Namespace, config: Config, models: Models) -> Models:
    """The dense models as Mixture-of-Experts ones."""
    if config.task == "classification":
        raise ValueError("task=classification: only a language model can be upcycled")
    moe = _asked_for(own, config)
    new: Models = {}
    for kind, model in models.items():
        assert isinstance(model, Decoder), "a language model"
        make = partial(upcycle_decoder, model, seed=config.train.seed)
        if kind == "weight":
            new[kind] = make(moe, noise=own.noise or 0.0, granularity=own.granularity)
            continue
        new[kind] = make(before_cutting(moe, own.granularity))
        change_experts(new[kind], partial(_settle_copies, own, POWERS[kind]))
    return new


def _settle_copies(own: argparse.Namespace, power: int, layer: MoE) -> None:
    of_copies(layer, layer.config.num_experts, power)
    if own.granularity > 1:
        split_carried(layer, own.granularity, power)
    if own.moments == "zero":
        zero(layer)


def _asked_for(own: argparse.Namespace, config: Config) -> MoEConfig:
    """The new layers: as the flags say, of as many experts."""
    if config.model.moe.num_experts > 0:
        raise ValueError(
            f"{own.run} has MoE layers of {config.model.moe.num_experts} experts: upcycle a dense model, or add experts"
        )
    moe = override_config(config, own.moe).model.moe
    if moe.d_ff is not None:
        raise ValueError(f"model.moe.d_ff={moe.d_ff}: copies are as wide as the dense layer; --granularity cuts them")
    return replace(moe, num_experts=int(own.which[0]))


def changed(own: argparse.Namespace, config: Config, models: Models, loads: Loads) -> Models:
    """Weights and moments with their experts changed, in place."""
    known = {block.feed_forward.layer for block in models["weight"].blocks if isinstance(block.feed_forward, MoE)}
    which: Which = {} if own.action in ("add", "split") else parse_which(own.which)
    if unknown := {layer for layer in which if layer is not None} - known:
        raise ValueError(f"layer {min(unknown)} has no experts: MoE layers are {', '.join(map(str, sorted(known)))}")
    for kind, model in models.items():
        change_experts(model, partial(_change, own, which, loads, config.train.seed, kind))
    return models


def _change(own: argparse.Namespace, which: Which, loads: Loads, seed: int, kind: Kind, layer: MoE) -> None:
    """One layer's weights, or moments."""
    count, power = layer.config.num_experts, POWERS.get(kind, 0)
    groups = which.get(layer.layer, which.get(None, []))
    ids = [index for group in groups for index in group]
    match own.action:
        case "add":
            _add(own, layer, seed, loads.get(layer.layer))
            if power:
                of_added(layer, count)
        case "split":
            parts = int(own.which[0])
            split_carried(layer, parts, power) if power else split_experts(layer, parts)
        case "merge" if groups:
            load = _load(loads.get(layer.layer), count, "--weights load") if own.weights == "load" else None
            merge_experts(layer, groups, load)
            if power == 2:
                of_merged(layer)
        case "remove" if ids:
            remove_experts(layer, ids)
        case "open" | "close" if ids:
            if not power:
                _check_state(own.action, layer, ids)
            (open_experts if own.action == "open" else close_experts)(layer, ids)
        case _:
            return  # no expert of this layer was named
    if power and own.moments == "zero":
        zero(layer)


def _check_state(action: str, layer: MoE, ids: list[int]) -> None:
    """Raises ValueError where experts are as they would be made."""
    opened = set(open_experts_of(layer))
    known = set(range(layer.config.num_experts))
    already = sorted(set(ids) & (opened if action == "open" else known - opened))
    if already:
        state = "open" if action == "open" else "closed"
        raise ValueError(f"experts {already} of layer {layer.layer} are {state} already: name others")


def _add(own: argparse.Namespace, layer: MoE, seed: int, load: list[int] | None) -> None:
    loaded = own.sources == "loaded"
    add_experts(
        layer,
        int(own.which[0]),
        own.init,
        sources=None if loaded or own.sources is None else numbers(own.sources),
        load_E=_load(load, layer.config.num_experts, "--sources loaded") if loaded else None,
        noise=0.01 if own.noise is None else own.noise,
        d_ff=own.d_ff,
        seed=seed,
        name=f"blocks.{layer.layer}.feed_forward.",
    )


def _load(load: list[int] | None, count: int, flag: str) -> torch.Tensor:
    if load is None or len(load) != count:
        raise ValueError(f"{flag} asks how loaded experts are, and no metrics.jsonl says it: leave out --no-loss")
    return torch.tensor(load)


def _yardstick(config: Config) -> Yardstick:
    try:
        return Yardstick(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"the loss cannot be measured: {error}; --no-loss leaves it out") from None


def _say(config: Config, checkpoint: Path) -> None:
    moe = config.model.moe
    now = f"{moe.num_experts} experts, top {moe.top_k}" if moe.num_experts else f"dense, d_ff {config.model.d_ff}"
    print(f"from      {checkpoint}: {now}")


def _what_next(config: Config, step: str) -> Iterator[str]:
    moe, folder = config.model.moe, config.run.folder
    for problem in moe_rules(moe, config.parallel, d_ff=config.model.d_ff, num_layers=config.model.num_layers):
        yield f"note      before it is trained on: {problem}"
    yield f"to        {folder}/checkpoints/{step}: {moe.num_experts} experts, top {moe.top_k}"
    yield f"          continue it:      moe-dist train {folder}/config.yaml --resume --train.steps N"
    yield f"          or begin with it: moe-dist train {folder}/config.yaml --run.name NEW --train.init-from {folder}"
