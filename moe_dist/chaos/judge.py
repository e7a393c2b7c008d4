"""Whether a run that went through faults is what it would have been without: bit, record and sample."""

import json
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from moe_dist.chaos.series import Series
from moe_dist.checkpoint.reader import Reader
from moe_dist.train.record.board import SYSTEM


def losses(chaos: Series, reference: Series, step: int) -> list[str]:
    """What `chaos` lost up to `step`, where both have a checkpoint; a line for each thing, none when nothing is."""
    found: list[str] = []
    for differences in (
        _weights(chaos.checkpoints, reference.checkpoints, step),
        _records(chaos.run, reference.run, step),
        _samples(chaos, reference, step),
    ):
        try:
            found += differences
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def records(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says and must say again: all but what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in SYSTEM} for line in lines]


def _weights(chaos: Path, reference: Path, step: int) -> Iterator[str]:
    name = f"step-{step:06d}"
    here, there = Reader(chaos / name), Reader(reference / name)
    yield from here.check_digests(0, 1)
    if here.manifest.shapes != there.manifest.shapes:
        yield f"{here.folder} has other parameters than {there.folder}"
        return
    if here.manifest.skipped != there.manifest.skipped:
        yield f"{here.folder}: {here.manifest.skipped} steps were left out, not {there.manifest.skipped}"
    for kind, tensor, elements in here.manifest.tensors():
        unlike = sum(
            int((a.view(torch.int32) != b.view(torch.int32)).sum())
            for a, b in zip(
                here.stream(kind, tensor, 0, elements), there.stream(kind, tensor, 0, elements), strict=True
            )
        )
        if unlike:
            shape = here.manifest.shapes[tensor]
            yield f"{here.folder}: {unlike} of {prod(shape)} values of {kind}/{tensor} are not those of {there.folder}"


def _records(chaos: Path, reference: Path, step: int) -> Iterator[str]:
    here, there = records(chaos), records(reference)
    for run, lines in ((chaos, here), (reference, there)):
        steps = [line["step"] for line in lines]
        if steps != list(range(1, step + 1)):
            missing, twice = set(range(1, step + 1)) - set(steps), [s for s, n in Counter(steps).items() if n > 1]
            yield f"{run}/metrics.jsonl: of steps 1 to {step}, {sorted(missing)} are missing and {twice} there twice"
    unlike = [mine["step"] for mine, its in zip(here, there, strict=False) if mine != its]
    if unlike:
        yield f"{chaos}/metrics.jsonl: the records of {len(unlike)} steps differ, that of step {unlike[0]} first"


def _samples(chaos: Series, reference: Series, step: int) -> Iterator[str]:
    here, there = chaos.samples(), reference.samples()
    if unknown := [number for number in range(1, step + 1) if not any(here.get(number, []))]:
        yield f"{chaos.run}: of {len(unknown)} steps nobody noted the samples, step {unknown[0]} first"
    unlike = [number for number in range(1, step + 1) if here.get(number) != there.get(number)]
    if unlike:
        yield f"{chaos.run}: {len(unlike)} steps read other samples, step {unlike[0]} first"
