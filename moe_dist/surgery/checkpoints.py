"""A checkpoint taken whole into one process, as a model of its weights and one of each of Adam's moments, and a run
folder made of such models: complete, or not there.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.find import run_of
from moe_dist.checkpoint.layout import Manifest, RunInfo
from moe_dist.checkpoint.reshard import Reader
from moe_dist.checkpoint.retention import Retention
from moe_dist.config import Config, EngineConfig
from moe_dist.config.load import dump_config
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.data.tokenizers import IN_RUN
from moe_dist.disk import flush, write_durably
from moe_dist.engine.base import STATE_KINDS, Kind
from moe_dist.engine.make import make_engine
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.launch import Rank, start, stop
from moe_dist.parallel.mesh import single_process_mesh

Models = dict[Kind, Trainable]
"""The weights, and each moment, in models of one shape."""
_HOW = ("dispatch", "experts", "wire", "wire_dtype", "overlap_chunks", "cpu_products")


def read_models(config: Config, reader: Reader) -> Models:
    return {kind: read_model(config, reader, kind) for kind in STATE_KINDS}


@torch.no_grad()
def read_model(config: Config, reader: Reader, kind: Kind) -> Trainable:
    """The model whole on this process, its parameters filled with tensors of `kind`, router states with weights.
    Moments that the checkpoint does not hold are zero."""
    built, manifest = _plain_model(config), reader.manifest
    absent: set[str] = set() if kind == "weight" else manifest.without_moments
    for name, param in built.named_parameters():
        if kind in manifest.kinds and name not in absent:
            param.copy_(reader.read(kind, name, 0, param.numel()).view_as(param))
        else:
            param.zero_()
    for name, buffer in built.named_buffers():
        buffer.copy_(reader.read("weight", name, 0, buffer.numel()).view_as(buffer))
    return built


def _plain_model(config: Config) -> Trainable:
    """On backends that one process has."""
    moe = replace(config.model.moe, dispatch="auto", experts="auto", wire="ragged", wire_dtype="same", overlap_chunks=1)
    attention = replace(config.model.attention, backend="torch")
    model = replace(config.model, moe=moe, attention=attention, kernels="torch", norm_kernels="same")
    model = resolve_backends(model, 1)
    mesh, seed = single_process_mesh(), config.train.seed
    if config.task == "classification":
        return Classifier(model, mesh, config.train.seq_len, seed)
    return Decoder(model, mesh, seed)


def changed_config(config: Config, moe: MoEConfig, output: Path) -> Config:
    """Of the new run. moe: of the changed model; how its layers compute stays as the run has it."""
    moe = replace(moe, **{name: getattr(config.model.moe, name) for name in _HOW})
    where = replace(config.run, root=str(output.parent), name=output.name)
    return replace(config, model=replace(config.model, moe=moe), run=where)


def write_run(models: Models, config: Config, checkpoint: Path, rank: Rank) -> None:
    """The run folder that `config` names: a checkpoint of the same step as `checkpoint`, which the models come from,
    the configuration and the tokenizer. It appears as a whole; what is not finished leaves nothing behind.

    Raises ValueError when the folder is there.
    """
    output, manifest = config.run.folder, Manifest.load(checkpoint)
    draft = output.with_name(f".surgery-{output.name}")
    shutil.rmtree(draft, ignore_errors=True)  # of one that was killed
    start(rank, "cpu", config.train.threads)
    try:
        optim = replace(config.optim, implementation="torch")
        engine = make_engine(models["weight"], single_process_mesh(), EngineConfig(), optim, 1, 1)
        for kind in STATE_KINDS[1:]:
            values = dict(models[kind].named_parameters())
            for piece in engine.held(kind):
                piece.values.copy_(values[piece.name].detach().view(-1))
        info = RunInfo(
            run=_identity(manifest.run, config.model),
            config=asdict(config),
            seed=manifest.random_state.seed,
            data_seed=manifest.data_position.seed,
        )
        saver = Saver(draft / "checkpoints", engine.mesh, Retention(), info)
        saver.save(engine, manifest.step, skipped=manifest.skipped)
        write_durably(draft / "config.yaml", dump_config(config))
        _copy_tokenizer(run_of(checkpoint), draft)
        flush(draft)
        if os.path.lexists(output):
            raise ValueError(f"{output} is there by now: name another folder")
        draft.rename(output)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        stop()
    flush(output.parent)


def _copy_tokenizer(run: Path, target: Path) -> None:
    if (run / "tokenizer.json").is_file():
        shutil.copy(run / "tokenizer.json", target)
    if (run / IN_RUN).is_dir():
        shutil.copytree(run / IN_RUN, target / IN_RUN)


def _identity(run: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """What a continued run must agree on, where it is of the model: as that is now."""
    now = json.loads(json.dumps(asdict(model)))
    return {name: _as_now(value, now) if name == "model" else value for name, value in run.items()}


def _as_now(said: Any, now: Any) -> Any:
    if not (isinstance(said, dict) and isinstance(now, dict)):
        return now
    return {name: _as_now(value, now[name]) for name, value in said.items() if name in now}
