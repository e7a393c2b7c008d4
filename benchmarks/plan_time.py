"""Planned beside measured step times: `python benchmarks/plan_time.py --rates 100mbit 400mbit 1gbit`, as root.

Two virtual nodes of a rank each, whose cables the kernel limits (slurm/local_network.sh); `--here` leaves the nodes
out, and both ranks are on this machine. At each rate:

1. `moe-dist plan --measure` on both ranks writes the hardware file, as a user would on the job's nodes.
2. Each layout trains for a few steps, `moe-dist train`; its time is the median of step_seconds after the first ones.
3. Each layout is planned by that file for the skew that came (`moe-dist plan --skew`): rows of the busiest rank's
   experts over an even share, the mean over the same steps and layers.

The table has planned / measured of each layout at each rate; the last line says how many are within 20%. Ranks have one
thread each, in the measurement as in training, and need a core each: where they share one, a rank that waits makes
another one faster, which no plan knows of. Nobody else should use the machine meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from race import cpu_name, restart_like_a_launch_script
from virtual_nodes import SCRIPT, first_address, network

from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.plan.hardware import load_hardware
from moe_dist.plan.plan import make_plan
from moe_dist.plan.size import span

ROOT = Path(__file__).resolve().parents[1]
NODES = 2
WITHIN = 0.2
MODEL = """
--model.d-model 256 --model.num-layers 4 --model.num-heads 8 --model.num-kv-heads 2 --model.d-ff 512
--model.moe.num-experts 8 --model.moe.top-k 2 --model.moe.capacity-factor null --model.moe.d-ff 512
--train.seq-len 256 --train.global-batch 16 --run.no-tensorboard --run.eval-sequences 4 --run.save-every 100000
""".split()
LAYOUTS = {
    "dp 2": "",
    "ep 2": "--parallel.ep 2",
    "ep 2, rows in bf16": "--parallel.ep 2 --model.moe.wire-dtype bf16",
    "ep 2, two chunks": "--parallel.ep 2 --model.moe.overlap-chunks 2",
    "tp 2, ep 2": "--parallel.ep 2 --parallel.tp 2",
    "ep 2, ZeRO-1": "--parallel.ep 2 --engine.name deepspeed --engine.zero-stage 1",
}


def on_ranks(command: Sequence[str], port: int, nodes: bool) -> None:
    """`moe-dist COMMAND` on all ranks. Exits where one of them fails."""
    each = 1 if nodes else NODES
    shared = {"WORLD_SIZE": str(NODES), "LOCAL_WORLD_SIZE": str(each), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if nodes:
        shared |= {"MASTER_ADDR": first_address(), "GLOO_SOCKET_IFNAME": "eth0"}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ranks = []
    for rank in range(NODES):
        where = [str(SCRIPT), "run", f"node{rank // each + 1}"] if nodes else []
        ranks.append(
            subprocess.Popen(
                [*where, sys.executable, "-m", "moe_dist.cli", *command],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % each)},
                stdout=subprocess.DEVNULL,
            )
        )
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.terminate()
            sys.exit(f"a rank of moe-dist {' '.join(command)} failed")
        time.sleep(0.1)
    if any(rank.returncode for rank in ranks):
        sys.exit(f"a rank of moe-dist {' '.join(command)} failed")


def records_of(folder: Path, warm_up: int) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["step"] > warm_up]


def skew_of(records: Sequence[dict[str, Any]], ep: int) -> float:
    """Rank k of an ep group has the k-th of ep equal parts of the experts."""
    loads_NE = torch.tensor([layer["load"] for record in records for layer in record["layers"]], dtype=torch.float64)
    by_rank_NR = loads_NE.unflatten(1, (ep, -1)).sum(2)
    return float((by_rank_NR.amax(1) / by_rank_NR.mean(1)).mean())


def planned_seconds(config: Config, hardware: Path, skew: float) -> float:
    return make_plan(config, NODES, load_hardware(str(hardware)), skew).time.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "400mbit", "1gbit"])
    parser.add_argument("--here", action="store_true", help="all ranks on this machine, without a network")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    args = parser.parse_args()
    restart_like_a_launch_script()
    rates: list[str | None] = [None] if args.here else args.rates
    rows: dict[str, list[str]] = {name: [] for name in args.only}
    ratios, port = [], 29510
    for rate in rates:
        with network(NODES, rate) if rate else nullcontext(), tempfile.TemporaryDirectory() as folder:
            hardware = Path(folder, "hardware.yaml")
            on_ranks(["plan", "--measure", str(hardware), "--device", "cpu"], port, rate is not None)
            for number, name in enumerate(args.only):
                flags = [*MODEL, *LAYOUTS[name].split(), "--train.steps", str(args.steps)]
                where = ["--run.root", folder, "--run.name", f"run-{number}", "--device", "cpu"]
                on_ranks(["train", *flags, *where], port + 1 + number, rate is not None)
                records = records_of(Path(folder, f"run-{number}"), args.warm_up)
                measured = statistics.median(record["step_seconds"] for record in records)
                config: Config = load_config(None, flags)
                skew = skew_of(records, config.parallel.ep)
                planned = planned_seconds(config, hardware, skew)
                ratios.append(planned / measured)
                rows[name].append(f"{skew:.2f} | {span(planned)} | {span(measured)} | {planned / measured:.2f}")
                print(f"{rate or 'here'}: {name}: {rows[name][-1]}", file=sys.stderr, flush=True)
        port += 20
    print(f"{cpu_name()}, {NODES} nodes of a rank, {args.steps - args.warm_up} steps\n")
    print("| layout | " + " | ".join(f"{rate or 'here'}, skew | planned | measured | ratio" for rate in rates) + " |")
    print("|---|" + "---|---|---|---|" * len(rates))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    good = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    print(f"\n{good} of {len(ratios)} within {WITHIN:.0%}; the ratios are {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
