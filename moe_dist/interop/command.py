"""`moe-dist import hf` and `moe-dist export hf`: on one process, and nothing half-written stays."""

import argparse
import sys
from collections.abc import Callable

import torch

from moe_dist.checkpoint.find import whole_checkpoint
from moe_dist.checkpoint.layout import Dtype
from moe_dist.config.extras import install
from moe_dist.interop.compare import can_compare, compared
from moe_dist.interop.hf_export import export_folder
from moe_dist.interop.hf_import import import_folder, new_folder

DONE, DIFFERENT, NOT_COMPARED = 0, 1, 3
_STORED: dict[str, Dtype] = {"fp32": "F32", "bf16": "BF16"}
_WRITTEN = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_ROUNDED = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Different(Exception):
    """The logits of both sides are not the same."""


def import_model(own: argparse.Namespace) -> int:
    """Returns the exit code. own: of import_arguments. Raises ValueError for what a user got wrong, and what cannot
    come in."""
    try:
        with new_folder(own.output) as draft:
            done = import_folder(own.path, draft, own.output, _STORED.get(own.dtype), own.leave_out)
            _tell(done.notes)
            rounded = _ROUNDED.get(own.dtype)
            checkpoint = draft / "checkpoints" / done.checkpoint.name
            code = _gate(own, lambda: compared(done.settings.model, checkpoint, own.path, rounded))
    except _Different as error:
        return _differ(error)
    family, table = done.settings.family.model_type, done.table
    print(f"{own.output}: {family}, {len(table.theirs)} tensors as {len(table.shapes)}, a checkpoint of step 0")
    return code


def export_model(own: argparse.Namespace) -> int:
    """Returns the exit code. own: of export_arguments. Raises ValueError for what a user got wrong, and what has no
    counterpart."""
    checkpoint = whole_checkpoint(own.run, lambda line: print(line, file=sys.stderr))
    try:
        with new_folder(own.output) as draft:
            done = export_folder(checkpoint, draft, _WRITTEN.get(own.dtype), own.max_shard_bytes)
            _tell(done.notes)
            rounded = _ROUNDED.get(own.dtype)
            code = _gate(own, lambda: compared(done.config.model, checkpoint, draft, rounded))
    except _Different as error:
        return _differ(error)
    files = "one file" if done.files == 1 else f"{done.files} files"
    print(f"{own.output}: {done.family.architecture} of {checkpoint}, weights in {files}")
    return code


def _gate(own: argparse.Namespace, compare: Callable[[], str]) -> int:
    if own.no_compare:
        return DONE
    if not can_compare():
        print(f"not compared: Transformers is not installed: {install('hf')}", file=sys.stderr)
        return NOT_COMPARED
    try:
        print(f"the same model: {compare()}")
    except ValueError as error:
        raise _Different(str(error)) from None
    return DONE


def _differ(error: _Different) -> int:
    print(f"moe-dist: {error}", file=sys.stderr)
    return DIFFERENT


def _tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
