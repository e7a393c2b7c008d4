"""Saving a checkpoint beside copying its bytes: `python benchmarks/checkpoint.py`.

The native engine, on one process or `--ranks` data-parallel ones: fp32 weights and both Adam moments. A save hashes,
writes and flushes to disk; the copy reads the same files from the page cache, each rank some, writes and flushes. They
take turns. Then a save in the background under training steps: for how much of its time do steps run, and how much
slower are they meanwhile?
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from race import device_name, race

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.layout import RunInfo
from moe_dist.checkpoint.retention import Retention
from moe_dist.config.parse import parse_dict
from moe_dist.engine.base import Engine
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.launch import spawn
from moe_dist.parallel.mesh import create_mesh
from moe_dist.step import StepContext

GOAL = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks of 3.3 million parameters each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel processes that hold the same")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder by default")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=own.folder) as folder:
        spawn(measure, own.ranks, own.layers, own.rounds, folder)


def measure(layers: int, rounds: int, folder: str) -> None:
    """One rank."""
    engine, step = engine_and_step(layers)
    step()
    say(f"{device_name()}, {dist.get_world_size()} ranks of {torch.get_num_threads()} threads")
    against_copy(engine, Path(folder), rounds)
    in_background(engine, step, Path(folder), rounds)


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def engine_and_step(layers: int):
    moe = {"num_experts": 8, "d_ff": 512}
    model = {"d_model": 256, "num_layers": layers, "num_heads": 4, "d_ff": 512, "moe": moe}
    config = parse_dict({"model": model}, "benchmark")
    mesh = create_mesh(1, 1)
    engine = make_engine(Decoder(resolve_backends(config.model, 1), mesh), mesh, config.engine, config.optim, 4, 1)
    tokens_BS = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(0))
    key = RandomKey.of("benchmark")

    def step() -> None:
        engine.micro_step(tokens_BS, tokens_BS, StepContext(key))
        engine.update(1e-4)

    return engine, step


def saver(engine: Engine, root: Path, background: bool) -> Saver:
    return Saver(root, engine.mesh, Retention(keep_last=1), RunInfo(), background)


def against_copy(engine: Engine, folder: Path, rounds: int) -> None:
    by = saver(engine, folder / "saved", background=False)
    source = by.save(engine, 1)
    sizes = sorted((path.stat().st_size for path in source.glob("*.safetensors")), reverse=True)
    size, ranks, main = sum(sizes), dist.get_world_size(), dist.get_rank() == 0
    say(f"the fullest file holds {sizes[0] / size:.1%} of all bytes")
    if main:
        shutil.copytree(source, folder / "source")
    dist.barrier()
    mine = sorted((folder / "source").iterdir())[dist.get_rank() :: ranks]

    def copy(number: int) -> None:
        if main:
            shutil.rmtree(folder / "copy", ignore_errors=True)
            (folder / "copy").mkdir()
        dist.barrier()
        for path in mine:
            target = shutil.copyfile(path, folder / "copy" / path.name)
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        dist.barrier()

    contestants = {"save": lambda number: by.save(engine, number), "copy": copy}
    numbers = iter(range(2, 1000))
    seconds = race(contestants, lambda: next(numbers), rounds, 1)
    rates = {name: size / 1e6 / value for name, value in seconds.items()}
    say(f"{size / 1e6:.0f} MB, medians of {rounds}: save {rates['save']:.0f} MB/s, copy {rates['copy']:.0f} MB/s")
    say(f"save / copy = {rates['save'] / rates['copy']:.2f} (goal {GOAL})")


def in_background(engine: Engine, step, folder: Path, rounds: int) -> None:
    def timed(work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    alone = statistics.median(timed(step) for _ in range(10))
    by = saver(engine, folder / "background", background=True)
    shares, blocked, walls, meanwhile = [], [], [], []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        blocked.append(timed(lambda number=number: by.save(engine, number)))
        while by.pending:
            meanwhile.append(timed(step))
            by.raise_pending()
        walls.append(time.perf_counter() - began)
        shares.append(1 - blocked[-1] / walls[-1])
    say(
        f"in the background, medians of {rounds}: {statistics.median(walls):.2f} s, training stands still for "
        f"{statistics.median(blocked) * 1e3:.0f} ms, steps run for {statistics.median(shares):.1%} of it"
    )
    say(f"a step takes {statistics.median(meanwhile) * 1e3:.0f} ms meanwhile, {alone * 1e3:.0f} ms otherwise")


if __name__ == "__main__":
    main()
