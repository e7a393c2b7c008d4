"""From a run, or one of its checkpoints, to a folder that Transformers reads.

The family is the one that means the same as the run's configuration (families.py); for an imported run, the one that it
came from is asked first, and what its config.json says beside the model stays. Tensors keep the precision that they are
stored in, so that an imported model goes out as it came; of a trained run, that is fp32.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as JsonFile
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from moe_dist.checkpoint.find import run_config, run_of
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.shard import FILE_DTYPE, Stored
from moe_dist.config import Config
from moe_dist.config.model import ModelConfig
from moe_dist.data.tokenizers import BYTES, IN_RUN, load_tokenizer
from moe_dist.disk import flush
from moe_dist.interop.accounts import Table
from moe_dist.interop.config_json import read_settings, settings_of
from moe_dist.interop.families import Family
from moe_dist.interop.folder import CONFIG, TOKENIZER_FILES, read_json, small_files, write_json, write_weights
from moe_dist.interop.hf_import import ORIGIN
from moe_dist.interop.meaning import meaning
from moe_dist.interop.names import Pair, is_open, theirs_of, unit_shape

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HALVES = (_DTYPES["BF16"], _DTYPES["F16"])


@dataclass(frozen=True)
class Exported:
    """notes: lines for a person. dtype: that all tensors were rounded to, None: as they are stored."""

    family: Family
    config: Config
    dtype: str | None
    files: int
    notes: list[str]


def export_folder(checkpoint: Path, draft: Path, dtype: str | None, most_bytes: int) -> Exported:
    """Write the Hugging Face folder `draft` from a checkpoint whose digests have been found right. dtype: F32, BF16 or
    F16. Raises ValueError with a line for all that has no counterpart there."""
    config, reader, run = run_config(checkpoint), Reader(checkpoint), run_of(checkpoint)
    if config.task != "language_modelling":
        raise ValueError(f"{checkpoint} was trained for {config.task}: only language models go out")
    origin = run / ORIGIN
    before = read_json(origin / CONFIG) if (origin / CONFIG).is_file() else {}
    family, settings = settings_of(config.model, before.get("model_type"))
    table = Table(family, config.model)
    _check_same_model(reader, table)
    _refuse_closed(reader)
    if before and before.get("model_type") != family.model_type:
        before = {}

    tensors = [_stored(name, parts, table, reader, dtype) for name, parts in theirs_of(table.pairs).items()]
    files = write_weights(draft, tensors, most_bytes)
    largest = max(tensors, key=lambda tensor: tensor.bytes)
    usual = {"max_position_embeddings": _longest(config), "dtype": _DTYPES[largest.dtype]}
    notes, tokens = _write_tokenizer(run, reader, draft)
    write_json(draft / CONFIG, _config_json(config.model, before, usual | tokens, settings, rounded=dtype is not None))
    if (origin / "generation_config.json").is_file():
        shutil.copyfile(origin / "generation_config.json", draft / "generation_config.json")
    elif tokens:
        write_json(draft / "generation_config.json", tokens)
    flush(draft)
    return Exported(family, config, dtype, files, notes)


def _config_json(
    model: ModelConfig, before: dict[str, Any], beside: dict[str, Any], settings: dict[str, Any], rounded: bool
) -> dict[str, Any]:
    """What an imported model came with, where that still says the model; else with `settings`. beside: what else there
    must be, where it did not come. rounded: the precision of the files was asked for, and is said in any case. Else it
    is said in place of a narrower one: Transformers would round to that what it loads."""
    said = [name for name in ("torch_dtype", "dtype") if before.get(name) is not None]
    narrower = [name for name in said if before[name] in _HALVES]
    precision = dict.fromkeys((said or ["dtype"]) if rounded else narrower, beside["dtype"])
    if before and meaning(read_settings(before).model) == meaning(model):
        return before | precision
    if said:
        beside.pop("dtype")
    return beside | before | settings | precision


def _longest(config: Config) -> int:
    """Tokens of a sequence that the model is for, where nobody said: as in training, or what scaling was made for."""
    at = config.model.attention
    if config.model.max_positions is not None:
        return config.model.max_positions
    if at.rope_scaling in ("yarn", "llama3") and at.rope_original_len is not None:
        return max(config.train.seq_len, round(at.rope_original_len * at.rope_factor))
    return config.train.seq_len


def _check_same_model(reader: Reader, table: Table) -> None:
    """What a checkpoint holds is what its configuration says."""
    stored = reader.manifest.shapes
    for name in sorted(stored.keys() | table.shapes.keys()):
        if stored.get(name) != table.shapes.get(name):
            raise ValueError(
                f"{reader.folder}: {name} is {stored.get(name, 'absent')} in the checkpoint, but its configuration "
                f"says {table.shapes.get(name, 'that there is none')}"
            )


def _refuse_closed(reader: Reader) -> None:
    for name, shape in reader.manifest.shapes.items():
        if not is_open(name):
            continue
        closed = (reader.read("weight", name, 0, prod(shape)) == 0).nonzero().flatten().tolist()
        if closed:
            raise ValueError(
                f"{reader.folder}: {name.removesuffix('.router.open_E')} has closed experts {closed}, and models there "
                "have none: take them out first with moe-dist experts"
            )


def _stored(name: str, parts: list[tuple[Pair, int]], table: Table, reader: Reader, dtype: str | None) -> Stored:
    ours = {place.name for pair, _ in parts for place in pair.ours}
    kinds = {kind for own in ours for kind in reader.dtypes("weight", own)}
    as_stored = "F32" if "F32" in kinds else "BF16"
    buffer = any(own in table.buffers for own in ours)
    new = as_stored if dtype is None or buffer else dtype
    return Stored(name, new, table.theirs[name], _values(parts, table, reader, FILE_DTYPE[as_stored], FILE_DTYPE[new]))


def _values(
    parts: list[tuple[Pair, int]], table: Table, reader: Reader, read: torch.dtype, wanted: torch.dtype
) -> Iterator[Tensor]:
    for pair, at in parts:
        units = []
        for place in pair.ours:
            shape = unit_shape(place, table.shapes)
            start = 0 if place.expert is None else place.expert * prod(shape)
            units.append(reader.read("weight", place.name, start, prod(shape), read).view(shape))
        yield pair.layout.to_theirs(units, table.heads)[at].to(wanted).contiguous().flatten()


def _write_tokenizer(run: Path, reader: Reader, draft: Path) -> tuple[list[str], dict[str, Any]]:
    """(notes, what config.json says of special tokens)."""
    origin, own = run / ORIGIN, run / IN_RUN
    came = [path for path in small_files(origin) if path.name in TOKENIZER_FILES]
    if came:
        for path in came:
            shutil.copyfile(path, draft / path.name)
        return [], {}
    if reader.manifest.run.get("tokenizer", BYTES) == BYTES:
        JsonFile.save(bytes_as_bpe(), str(draft / "tokenizer.json"))
        _write_tokenizer_config(draft, {})
        return ["bytes are tokens: tokenizer.json holds 256 of them and no merges"], {"eos_token_id": 0}
    if not own.is_dir():
        return ["this run has no tokenizer"], {}
    tokenizer = load_tokenizer(str(own))
    for file, data in tokenizer.files.items():
        (draft / file).write_bytes(data)
    if tokenizer.kind == "tokenizers":
        _write_tokenizer_config(draft, read_json(draft / "tokenizer_config.json"))
    notes = [f"{IN_RUN} is copied as it is; Transformers may want it converted: {', '.join(tokenizer.files)}"]
    return ([] if tokenizer.kind == "tokenizers" else notes), {"eos_token_id": tokenizer.end_id}


def _write_tokenizer_config(draft: Path, values: dict[str, Any]) -> None:
    write_json(draft / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **values})


def bytes_as_bpe() -> JsonFile:
    """Byte i is token i, as in ByteTokenizer."""
    letters = sorted(ByteLevel.alphabet())
    of_byte = {_byte_of(letter): letter for letter in letters}
    tokenizer = JsonFile(BPE(vocab={of_byte[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _byte_of(letter: str) -> int:
    """Printable letters of Latin-1 stand for themselves; the other bytes, in order, for letters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]
