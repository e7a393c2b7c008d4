"""What a slow network costs: `python benchmarks/network.py --rates 100mbit 400mbit 1gbit`, as root.

Ranks of one thread live on virtual nodes, whose cables the kernel limits (slurm/local_network.sh). Contestants take
turns and so do rates: each round goes over all rates, each rate over all contestants, with the same input. A step ends
when the last rank ends.

* `dispatch`, 2 nodes x 2 ranks: forward and backward of an MoE layer whose experts have 16 hidden units, so that little
  but its exchanges takes time, for every way to carry rows.
* `gradients`, 2 nodes x 1 rank: those of a dense decoder. The collectives alone, `all_reduce`, and `reduce_scatter` and
  `all_gather` as ZeRO has them; and forward and backward in the native engine, with gradients exchanged after it, in
  buckets meanwhile, or not at all. `hidden`: the part of that exchange which buckets take off the step.

`MB`: what the fullest cable carries in a step, in its busier direction, headers included, as the kernel counts it.
`/ cable`: the step's time over the time that these bytes take at this rate. Results are kept in plots/network.json, and
printed as a table for RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dispatch import Cell, layer_step, make_layer
from race import cpu_name, restart_like_a_launch_script
from torch import Tensor
from virtual_nodes import SCRIPT, first_address, network

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.native import NativeEngine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.collectives import all_gather, all_reduce, reduce_scatter
from moe_dist.parallel.launch import rank_from_environment, start, stop
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.step import StepContext

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "plots" / "network.json"
STEP = StepContext(RandomKey.of("network"))
RANKS_PER_NODE = {"dispatch": 2, "gradients": 1}
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
ALONE, AFTER, BUCKETS = "no exchange", "exchange after backward", "exchange in buckets"

Step = Callable[[Any], object]
WAYS: dict[str, dict[str, Any]] = {
    "all_to_all": dict(dispatch="all_to_all"),
    "all_to_all, padded": dict(dispatch="all_to_all", wire="padded"),
    "hierarchical": dict(dispatch="hierarchical"),
    "all_gather": dict(dispatch="all_gather"),
}
WIRES = {"fp32": "same", "bf16": "bf16", "fp8": "fp8"}


def bits(rate: str) -> float:
    """A second, of a rate as tc writes it. Raises ValueError for `none`, which promises nothing to compare with."""
    number, unit = rate[:-4], rate[-4:]
    if unit not in UNITS or not number.isdigit():
        raise ValueError(f"rate {rate}: say a number and kbit, mbit or gbit, for example 400mbit")
    return int(number) * UNITS[unit]


def dispatch(tokens: int) -> tuple[dict[str, Step], Callable[[], Any]]:
    """(contestants, what draws their input)."""
    mesh = create_mesh(dist.get_world_size(), 1)
    cell = Cell(top_k=2, d_ff=16, num_experts=8, activation="relu", tokens=tokens)
    layers = {
        f"{way}, {form}": make_layer(cell, mesh, torch.float32, **how, wire_dtype=wire)
        for way, how in WAYS.items()
        for form, wire in WIRES.items()
    }
    generator = torch.Generator().manual_seed(dist.get_rank())

    def draw() -> tuple[Tensor, ...]:
        return torch.randn(2, tokens, cell.d_model, generator=generator).unbind(0)

    return {name: layer_step(layer, []) for name, layer in layers.items()}, draw


def gradients(tokens: int) -> tuple[dict[str, Step], Callable[[], Any]]:
    """(contestants, what draws their input)."""
    mesh = create_mesh(1, 1)
    model = ModelConfig(d_model=256, num_layers=4, num_heads=4, d_ff=1024, moe=MoEConfig(num_experts=0))
    model = resolve_backends(model, 1)

    def engine(mesh: Mesh, bucket_mib: float | None) -> Step:
        how = EngineConfig(name="native", bucket_mib=bucket_mib)
        native = NativeEngine(Decoder(model, mesh, 0), mesh, how, OptimConfig(), 1)

        def step(tokens_BS: Tensor) -> None:
            native.micro_step(tokens_BS[:, :-1], tokens_BS[:, 1:], STEP)
            native.discard()

        return step

    size = sum(param.numel() for param in Decoder(model, single_process_mesh(), 0).parameters())
    flat = torch.zeros(size // mesh.world.size * mesh.world.size)
    contestants: dict[str, Step] = {
        "all_reduce": lambda _: all_reduce(flat, mesh.world),
        "reduce_scatter, all_gather": lambda _: all_gather(reduce_scatter(flat, mesh.world), mesh.world),
        ALONE: engine(single_process_mesh(), None),
        AFTER: engine(mesh, None),
        BUCKETS: engine(mesh, 1.0),
    }
    generator = torch.Generator().manual_seed(dist.get_rank())
    return contestants, lambda: torch.randint(256, (tokens // 128, 129), generator=generator)


SECTIONS = {"dispatch": dispatch, "gradients": gradients}


def carried() -> Tensor:
    """Bytes (in, out) of this node's cable since it was made."""
    line = next(line for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines() if "eth0:" in line)
    return torch.tensor([int(line.split()[1]), int(line.split()[9])])


def measure(section: str, rates: list[str], rounds: int, warm_up: int, tokens: int, out: Path) -> None:
    """On every rank; the first one sets rates, and writes."""
    contestants, draw = SECTIONS[section](tokens)
    found: dict[str, dict[str, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    world = create_mesh(1, 1).world
    for index in range(warm_up + rounds):
        drawn = draw()
        for rate in rates:
            if world.rank == 0:
                subprocess.run([SCRIPT, "rate", rate], check=True)
            for name, step in contestants.items():
                dist.barrier()
                before, began = carried(), time.perf_counter()
                step(drawn)
                dist.barrier()
                seconds = time.perf_counter() - began
                fullest = int(all_reduce(carried() - before, world, dist.ReduceOp.MAX).max())
                if index >= warm_up:
                    found[name][rate].append((seconds, fullest))
    if world.rank == 0:
        rows = {name: {rate: medians(steps) for rate, steps in at.items()} for name, at in found.items()}
        out.write_text(json.dumps(rows), encoding="utf-8")


def medians(steps: list[tuple[float, int]]) -> list[float]:
    return [statistics.median(column) for column in zip(*steps, strict=True)]


def on_nodes(section: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """`measure` on ranks of all nodes. Exits where one of them fails."""
    each = RANKS_PER_NODE[section]
    shared = {"WORLD_SIZE": str(args.nodes * each), "LOCAL_WORLD_SIZE": str(each), "GLOO_SOCKET_IFNAME": "eth0"}
    shared |= {"MASTER_ADDR": first_address(), "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    shared["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns of addresses that no name server knows
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ranks = [
        subprocess.Popen(
            [SCRIPT, "run", f"node{rank // each + 1}", sys.executable, *sys.argv, "--section", section, str(out)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % each)},
        )
        for rank in range(args.nodes * each)
    ]
    while any(rank.poll() is None for rank in ranks):  # who hangs ends with the network
        if any(rank.poll() for rank in ranks):
            sys.exit(f"{section}: a rank failed")
        time.sleep(0.1)
    return {"ranks_per_node": each, "rows": json.loads(out.read_text(encoding="utf-8"))}


def table(section: str, result: dict[str, Any], nodes: int, rates: list[str]) -> Iterator[str]:
    """In Markdown."""
    rows = result["rows"]
    yield (
        f"| {section}, {nodes} nodes x {result['ranks_per_node']} | MB | "
        + " | ".join(f"{rate}, ms | / cable" for rate in rates)
        + " |"
    )
    yield "|---|---|" + "---|---|" * len(rates)
    for name, at in rows.items():
        cells = [f"{statistics.median(at[rate][1] for rate in rates) / 1e6:.2f}"]
        for rate in rates:
            seconds, carried = at[rate]
            cells += [f"{seconds * 1e3:.1f}", "" if name == ALONE else f"{seconds / (carried * 8 / bits(rate)):.2f}"]
        yield f"| {name} | " + " | ".join(cells) + " |"
    if AFTER in rows:
        cells = [""]
        for rate in rates:
            alone, after, meanwhile = (rows[name][rate][0] for name in (ALONE, AFTER, BUCKETS))
            cells += [f"{(after - meanwhile) / (after - alone):.0%}", ""]
        yield "| hidden | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "400mbit", "1gbit"])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each contestant at each rate")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank, a multiple of 128")
    parser.add_argument("--no-file", action="store_true", help="only print")
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)  # this is one of the ranks
    args = parser.parse_args()
    for rate in args.rates:
        bits(rate)
    if args.section:
        start(rank_from_environment(os.environ), "cpu")
        measure(args.section[0], args.rates, args.rounds, args.warm_up, args.tokens, Path(args.section[1]))
        stop()
        return
    restart_like_a_launch_script()
    found: dict[str, Any] = {"cpu": cpu_name(), "nodes": args.nodes, "rounds": args.rounds, "tokens": args.tokens}
    with network(args.nodes, args.rates[0]), tempfile.TemporaryDirectory() as folder:
        for section in args.only:
            found[section] = on_nodes(section, args, Path(folder, section))
            print("\n".join(table(section, found[section], args.nodes, args.rates)), end="\n\n", flush=True)
    if not args.no_file:
        KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
