"""From a Hugging Face folder to the folder of a run, with a checkpoint of step 0 that holds weights alone.

    OUTPUT/config.yaml      the model, and the usual of all else      tokenizer/      as data.tokenizer reads it
           checkpoints/step-000000/                                   hugging_face/   their small files, for exports

Nothing is rounded that --dtype does not ask to round: bf16 stays bf16, fp16 and fp32 become fp32.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.layout import MANIFEST, Dtype, Manifest, Position, Range, ShardFile
from moe_dist.checkpoint.shard import TORCH_DTYPE, write_shard
from moe_dist.config import Config, validate
from moe_dist.config.load import dump_config
from moe_dist.config.parse import parse_dict
from moe_dist.config.schema import DataConfig, RunConfig, TrainConfig
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.data.tokenizers import IN_RUN, load_tokenizer, save_tokenizer
from moe_dist.disk import flush, write_durably
from moe_dist.interop.accounts import Table, account
from moe_dist.interop.config_json import Settings, read_settings
from moe_dist.interop.folder import CONFIG, TOKENIZER_FILES, Weights, read_json, small_files
from moe_dist.interop.names import Pair, is_open, ours_of, unit_shape

ORIGIN = "hugging_face"
"""The folder of an imported run that holds the small files it came with."""
UNKNOWN_TOKENIZER = "that of the imported model"
"""What a checkpoint says of its tokenizer where none came with it."""
_FILE_BYTES = 2**32
_LONGEST = 2048  # tokens of a sequence that an imported run's configuration begins with, where the model takes more


@dataclass(frozen=True)
class Imported:
    """notes: lines for a person. checkpoint: where it is in the finished folder."""

    settings: Settings
    table: Table
    checkpoint: Path
    notes: list[str]


def import_folder(
    source: Path, draft: Path, output: Path, dtype: Dtype | None, leave_out: Sequence[str] = ()
) -> Imported:
    """Write the run folder `draft`, which will be called `output`. Raises ValueError for what cannot come in."""
    if not source.is_dir():
        raise ValueError(f"{source} is no folder: download a model first, with: hf download OWNER/NAME --local-dir DIR")
    values = read_json(source / CONFIG)
    settings = read_settings(values)
    model = settings.model
    tokenizer, note = _tokenizer(source)
    config = _config(settings, values, output, tokenizer)
    validate(config, 1)
    table, weights = Table(settings.family, model), Weights(source)
    notes = [*settings.notes, *note, *account(weights, table, model.tie_embeddings, leave_out)]

    step = draft / "checkpoints" / "step-000000"
    step.mkdir(parents=True)
    shards = _write(step, table, weights, dtype)
    start = Position(seed=config.train.seed, next_step=0)
    manifest = Manifest(
        step=0,
        data_position=start,
        random_state=start,
        run={"tokenizer": UNKNOWN_TOKENIZER if tokenizer is None else tokenizer.digest},
        config=asdict(config),
        kinds=["weight"],
        shapes=table.shapes,
        buffers=table.buffers,
        files=shards,
    )
    write_durably(step / MANIFEST, manifest.dumps())
    write_durably(draft / "config.yaml", dump_config(config))
    if tokenizer is not None:
        save_tokenizer(tokenizer, draft / IN_RUN)
    (draft / ORIGIN).mkdir()
    for file in small_files(source):
        shutil.copyfile(file, draft / ORIGIN / file.name)
    for folder in (step, draft / ORIGIN, draft):
        flush(folder)
    return Imported(settings, table, output / "checkpoints" / step.name, notes)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes it when the block ends, and nothing when the block fails."""
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: --output must name a new folder")
    draft = target.with_name(f".making-{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(target)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush(target.parent)


def _config(settings: Settings, values: dict[str, Any], output: Path, tokenizer: Tokenizer | None) -> Config:
    longest = settings.model.max_positions or values.get("max_position_embeddings") or _LONGEST
    data = DataConfig() if tokenizer is None else DataConfig(tokenizer=str(output.absolute() / IN_RUN))
    made = Config(
        model=settings.model,
        data=data,
        train=TrainConfig(seq_len=min(longest, _LONGEST)),
        run=RunConfig(root=str(output.absolute().parent), name=output.name),
    )
    return parse_dict(asdict(made), CONFIG)  # refuses values of another type


def _tokenizer(source: Path) -> tuple[Tokenizer | None, list[str]]:
    """What a run can read of it, and a line where that is nothing."""
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None, ["no tokenizer came with it"]
    try:
        return load_tokenizer(str(source)), []
    except ValueError as error:
        return None, [f"the tokenizer is kept for exports alone: {error}"]


def _write(step: Path, table: Table, weights: Weights, dtype: Dtype | None) -> list[ShardFile]:
    made_of, files = ours_of(table.pairs), list[ShardFile]()
    batch, size = list[tuple[Range, Iterator[Tensor]]](), 0
    for name, shape in table.shapes.items():
        new: Dtype = "F32" if name in table.buffers else _stored_as(made_of.get(name, []), weights, dtype)
        values = _open(shape) if is_open(name) else _values(made_of[name], table, weights, TORCH_DTYPE[new])
        piece = Range(kind="weight", name=name, start=0, length=prod(shape), dtype=new)
        batch.append((piece, values))
        size += piece.bytes
        if size >= _FILE_BYTES:
            files.append(write_shard(step / f"part-{len(files):05d}.safetensors", batch))
            batch, size = [], 0
    if batch:
        files.append(write_shard(step / f"part-{len(files):05d}.safetensors", batch))
    return files


def _stored_as(parts: list[tuple[Pair, int]], weights: Weights, asked: Dtype | None) -> Dtype:
    found = {place.name: weights.dtype(place.name) for pair, _ in parts for place in pair.theirs}
    wider = {theirs: kind for theirs, kind in found.items() if kind not in ("F32", "F16", "BF16")}
    if asked is None and wider:
        theirs, kind = min(wider.items())
        raise ValueError(
            f"{weights.folder}: {theirs} is stored as {kind}, and checkpoints here hold fp32 and bf16: name what to "
            "round it to, --dtype fp32"
        )
    return asked or ("BF16" if set(found.values()) == {"BF16"} else "F32")


def _values(parts: list[tuple[Pair, int]], table: Table, weights: Weights, dtype: torch.dtype) -> Iterator[Tensor]:
    for pair, at in parts:
        made = pair.layout.to_ours([weights.read(place) for place in pair.theirs], table.heads)[at]
        assert tuple(made.shape) == unit_shape(pair.ours[at], table.shapes), pair.ours[at]
        yield made.to(dtype).contiguous().flatten()


def _open(shape: Sequence[int]) -> Iterator[Tensor]:
    yield torch.ones(prod(shape))
