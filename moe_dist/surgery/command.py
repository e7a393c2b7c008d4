"""`moe-dist experts`: change the experts of a trained model, from one checkpoint to another, on one process.

The run's model is built here whole, three times: for its weights and for the two Adam moments, which go through the
same surgery (surgery/layers.py). Moments of added experts are zero. What comes out is a run folder with one checkpoint,
of the same step, that `moe-dist train OUT/config.yaml --resume` continues in any layout.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.find import run_config, run_of, whole_checkpoint
from moe_dist.checkpoint.layout import RunInfo
from moe_dist.checkpoint.reshard import Reader
from moe_dist.checkpoint.retention import Retention
from moe_dist.config import Config, EngineConfig
from moe_dist.config.load import dump_config
from moe_dist.data.tokenizers import IN_RUN
from moe_dist.disk import lines_backwards, replace_text
from moe_dist.engine.base import STATE_KINDS, Kind
from moe_dist.engine.make import make_engine
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.trainable import Trainable
from moe_dist.moe.layer import MoE
from moe_dist.parallel.launch import rank_from_environment, start, stop
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.surgery.layers import add_experts, close_experts, open_experts, remove_experts
from moe_dist.surgery.models import change_experts


def experts(own: argparse.Namespace) -> int:
    """own: of experts_arguments. Returns the exit code. Raises ValueError for what a user got wrong."""
    config, listing = run_config(own.run), own.action == "list"
    numbers = [] if listing else _numbers(own.which)
    if not listing and (own.output is None or own.output.exists()):
        raise ValueError(f"--output {own.output or ''} must name a folder that is not there yet")
    if own.action == "add" and len(numbers) != 1:
        raise ValueError(f"add takes how many experts, one number, got {own.which!r}")
    checkpoint = whole_checkpoint(own.run, lambda line: print(line, file=sys.stderr))
    if listing:
        print("\n".join(describe(read_model(config, Reader(checkpoint), "weight"), run_of(checkpoint))))
        return 0

    def change(layer: MoE) -> object:
        match own.action:
            case "add":
                seed, name = config.train.seed, f"blocks.{layer.layer}.feed_forward."
                return add_experts(layer, numbers[0], own.init, seed=seed, name=name)
            case "remove":
                return remove_experts(layer, numbers)
            case "open":
                open_experts(layer, numbers)
            case "close":
                close_experts(layer, numbers)
        return None

    rewrite(config, checkpoint, own.output, change)
    print(f"{own.output} holds {checkpoint.name}; continue it with: moe-dist train {own.output}/config.yaml --resume")
    return 0


def read_model(config: Config, reader: Reader, kind: Kind) -> Trainable:
    """The model whole on this process, its parameters filled with tensors of `kind`; router states with weights."""
    moe = replace(config.model.moe, dispatch="auto", experts="auto", wire="ragged", wire_dtype="same", overlap_chunks=1)
    attention = replace(config.model.attention, backend="torch")
    model = replace(config.model, moe=moe, attention=attention, kernels="torch", norm_kernels="same")
    model = resolve_backends(model, 1)
    mesh, seed = single_process_mesh(), config.train.seed
    built: Trainable
    if config.task == "classification":
        built = Classifier(model, mesh, config.train.seq_len, seed)
    else:
        built = Decoder(model, mesh, seed)
    with torch.no_grad():
        for name, param in built.named_parameters():
            param.copy_(reader.read(kind, name, 0, param.numel()).view_as(param))
        for name, buffer in built.named_buffers():
            buffer.copy_(reader.read("weight", name, 0, buffer.numel()).view_as(buffer))
    return built


def rewrite(config: Config, checkpoint: Path, output: Path, change: Callable[[MoE], object]) -> None:
    """`change` every MoE layer of a checkpoint, whose digests have been found right; the new run folder is `output`."""
    reader = Reader(checkpoint)
    before = config.model.moe.num_experts
    models = {kind: read_model(config, reader, kind) for kind in STATE_KINDS}
    for kind, model in models.items():
        change_experts(model, change)
        if kind != "weight":
            change_experts(model, lambda layer: _zero_from(layer, before))
    rank = rank_from_environment(os.environ)
    if rank.world != 1:
        raise ValueError(f"this is rank {rank.rank} of {rank.world}: run moe-dist experts on its own, without torchrun")
    changed = models["weight"].config.moe
    start(rank, "cpu", config.train.threads)
    optim = replace(config.optim, implementation="torch")
    engine = make_engine(models["weight"], single_process_mesh(), EngineConfig(), optim, 1, 1)
    for kind in STATE_KINDS[1:]:
        values = dict(models[kind].named_parameters())
        for piece in engine.held(kind):
            piece.values.copy_(values[piece.name].detach().view(-1))
    manifest = reader.manifest
    seeds = dict(seed=manifest.random_state.seed, data_seed=manifest.data_position.seed)
    info = RunInfo(run=manifest.run, config=manifest.config, **seeds)
    Saver(output / "checkpoints", engine.mesh, Retention(), info).save(engine, manifest.step)
    stop()
    moe = replace(config.model.moe, num_experts=changed.num_experts, d_ff=changed.d_ff, num_groups=changed.num_groups)
    where = replace(config.run, root=str(output.parent), name=output.name)
    replace_text(output / "config.yaml", dump_config(replace(config, model=replace(config.model, moe=moe), run=where)))
    tokenizer = run_of(checkpoint) / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copy(tokenizer, output / tokenizer.name)
    if (run_of(checkpoint) / IN_RUN).is_dir():
        shutil.copytree(run_of(checkpoint) / IN_RUN, output / IN_RUN)


def describe(model: Trainable, run: Path) -> list[str]:
    """A line for each MoE layer: its experts, which of them are closed, and their load in the last step on record."""
    loads, lines = _last_loads(run), []

    def line(layer: MoE) -> None:
        closed = layer.router.open_E.eq(0).nonzero().flatten().tolist()
        words = [f"layer {layer.layer}: {layer.config.num_experts} experts of width"]
        words.append("/".join(map(str, sorted(set(layer.experts.widths)))) + f", top {layer.config.top_k}")
        words.append(f"closed {closed}" if closed else "all open")
        load = loads.get(layer.layer, [])
        if len(load) == layer.config.num_experts and any(load):
            words.append("load " + " ".join(f"{value / sum(load):.1%}" for value in load))
        lines.append(" ".join(words[:2]) + "; " + "; ".join(words[2:]))

    change_experts(model, line)
    return lines


def _last_loads(run: Path) -> dict[int, list[int]]:
    line = next((line for _, line in lines_backwards(run / "metrics.jsonl")), b"{}")
    record: dict[str, Any] = json.loads(line)
    return {row["layer"]: row["load"] for row in record.get("layers", [])}


@torch.no_grad()
def _zero_from(layer: MoE, first: int) -> None:
    """Experts from number `first` on become zero: in a model that holds moments, those are added ones."""
    count = layer.config.num_experts
    for param in [*layer.router.parameters(), *layer.experts.parameters()]:
        by_expert = param.shape[0] == count
        param[first if by_expert else sum(layer.experts.widths[:first]) :] = 0.0


def _numbers(which: str) -> list[int]:
    try:
        return [int(number) for number in which.split(",")]
    except ValueError:
        raise ValueError(f"{which!r} is no list of numbers: write 2, or 0,4,5") from None
