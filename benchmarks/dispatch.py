"""What expert parallelism costs: `python benchmarks/dispatch.py --ranks 2 4 --cells a b`.

Forward and backward of one MoE layer on ranks of one thread, experts cut over all of them, for every way to carry rows.
Contestants take turns in one process group, with new tokens in every round; a step ends when the last rank ends.

* `ep = 1`: the same layer with all experts on every rank and as many tokens, run by all ranks at the same time; the
  gradients of its experts are not all-reduced.
* `raw exchange`: the four all_to_all_single of the rows that `all_to_all` exchanges, there and back, and again for
  their gradients, with nothing else.

A dispatcher that cost nothing but its exchange would take the sum of these two: `/ bound` is over that sum. Results are
kept in plots/dispatch.json, cell by cell, and drawn from there.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from race import cpu_name, race, restart_like_a_launch_script
from torch import Tensor

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.block import moe_layer
from moe_dist.moe.layer import MoE
from moe_dist.parallel.collectives import all_gather, all_reduce, exchange_rows
from moe_dist.parallel.launch import spawn
from moe_dist.parallel.mesh import Mesh, create_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import StepContext

PLOTS = Path(__file__).resolve().parent / "plots"
STEP = StepContext(RandomKey.of("benchmark"))
EP1, RAW = "ep = 1", "raw exchange"


@dataclass(frozen=True)
class Cell:
    top_k: int
    d_ff: int
    num_experts: int
    activation: Any
    d_model: int = 512
    tokens: int = 2048

    def __str__(self) -> str:
        return f"top-{self.top_k}, d {self.d_model}, ff {self.d_ff}, E {self.num_experts}, {self.activation}"


CELLS = {"a": Cell(1, 2048, 8, "relu"), "b": Cell(2, 1024, 32, "swiglu")}
CARRIERS: dict[str, dict[str, Any]] = {
    "all_to_all": dict(dispatch="all_to_all"),
    "all_to_all, overlap 2": dict(dispatch="all_to_all", overlap_chunks=2),
    "all_to_all, overlap 4": dict(dispatch="all_to_all", overlap_chunks=4),
    "all_to_all, padded": dict(dispatch="all_to_all", wire="padded"),
    "all_to_all, bf16 wire": dict(dispatch="all_to_all", wire_dtype="bf16"),
    "all_to_all, fp8 wire": dict(dispatch="all_to_all", wire_dtype="fp8"),
    "hierarchical": dict(dispatch="hierarchical"),
    "all_gather": dict(dispatch="all_gather"),
}


def make_layer(cell: Cell, mesh: Mesh, dtype: torch.dtype, **how: Any) -> MoE:
    moe = MoEConfig(num_experts=cell.num_experts, top_k=cell.top_k, capacity_factor=None, **how)
    model = ModelConfig(d_model=cell.d_model, d_ff=cell.d_ff, activation=cell.activation, moe=moe)
    layer = moe_layer(resolve_backends(model, mesh.ep.size), 0, mesh)
    initialize(layer, seed=0)
    return layer.to(dtype)


def layer_step(layer: MoE, sent: list[int]) -> Callable[[tuple[Tensor, Tensor]], None]:
    def step(drawn: tuple[Tensor, Tensor]) -> None:
        x_TD = drawn[0].detach().requires_grad_()
        y_TD, stats = layer(x_TD, STEP)
        torch.autograd.backward((y_TD, stats.aux_loss), (drawn[1], None))
        sent.append(stats.sent_bytes)
        layer.zero_grad(set_to_none=True)
        dist.barrier()

    return step


class Raw:
    """The exchanges alone; counts are of the tokens drawn."""

    def __init__(self, cell: Cell, mesh: Mesh, router: MoE, dtype: torch.dtype) -> None:
        self.cell, self.mesh, self.layer, self.dtype = cell, mesh, router, dtype
        self.fullest: list[float] = []

    @torch.no_grad()
    def prepare(self, x_TD: Tensor) -> None:
        """Not timed."""
        ep = self.mesh.ep
        counts_E = self.layer.router(x_TD, STEP).stats.counts_QE.sum(0)
        sent_PP = all_gather(counts_E[None], ep).view(ep.size, ep.size, -1).sum(2)
        self.send, self.receive = sent_PP[ep.rank].tolist(), sent_PP[:, ep.rank].tolist()
        self.there = torch.randn(sum(self.send), self.cell.d_model).to(self.dtype)
        self.here = torch.randn(sum(self.receive), self.cell.d_model).to(self.dtype)
        self.fullest.append(float(sent_PP.sum(0).max() * ep.size / sent_PP.sum()))

    def __call__(self, _: tuple[Tensor, Tensor]) -> None:
        for _ in range(2):
            exchange_rows(self.there, self.send, self.receive, self.mesh.ep)
            exchange_rows(self.here, self.receive, self.send, self.mesh.ep)
        dist.barrier()


def measure(name: str, cell: Cell, only: list[str], rounds: int, warm_up: int, dtype: torch.dtype, out: str) -> None:
    """On every rank; the first one writes."""
    world = dist.get_world_size()
    node_size = 2 if world > 2 else 1
    mesh, alone = create_mesh(world, 1, node_size=node_size), create_mesh(1, 1)
    local, sent = cell.num_experts // world, {carrier: [0] for carrier in (EP1, RAW, *only)}
    whole = make_layer(cell, alone, dtype, dispatch="local")
    raw = Raw(cell, mesh, whole, dtype)
    contestants: dict[str, Callable[[Any], Any]] = {EP1: layer_step(whole, sent[EP1]), RAW: raw}
    for carrier in only:
        if local % CARRIERS[carrier].get("overlap_chunks", 1) == 0:
            contestants[carrier] = layer_step(make_layer(cell, mesh, dtype, **CARRIERS[carrier]), sent[carrier])
    generator = torch.Generator().manual_seed(dist.get_rank())

    def draw() -> tuple[Tensor, Tensor]:
        x_TD, grad_TD = torch.randn(2, cell.tokens, cell.d_model, generator=generator).to(dtype).unbind(0)
        raw.prepare(x_TD)
        dist.barrier()
        return x_TD, grad_TD

    seconds = race(contestants, draw, rounds, warm_up)
    bound = seconds[EP1] + seconds[RAW]
    rows = {}
    for carrier, median in seconds.items():
        mean_sent = sum(sent[carrier][1 + warm_up :]) / rounds
        total = all_reduce(torch.tensor(mean_sent, dtype=torch.float64), mesh.world) / world
        rows[carrier] = dict(ms=median * 1e3, ratio=median / bound, sent_mb=float(total) / 1e6)
    if dist.get_rank() == 0:
        fullest = sum(raw.fullest) / len(raw.fullest)
        result = dict(cell=name, shape=str(cell), ranks=world, dtype=str(dtype), node_size=node_size, fullest=fullest)
        Path(out).write_text(json.dumps(result | dict(rounds=rounds, rows=rows, cpu=cpu_name())), encoding="utf-8")


def show(result: dict[str, Any]) -> None:
    print(f"\ncell {result['cell']} ({result['shape']}), {result['ranks']} ranks, {result['dtype']}, ", end="")
    print(f"2,048 tokens a rank; median of {result['rounds']} rounds; {result['cpu']}")
    print(f"the fullest rank computes {result['fullest']:.3f} of the mean; nodes of {result['node_size']}")
    print(f"{'':24}{'ms':>8}{'/ bound':>9}{'MB sent':>9}")
    for carrier, row in result["rows"].items():
        ratio = "" if carrier in (EP1, RAW) else f"{row['ratio']:9.3f}{row['sent_mb']:9.2f}"
        print(f"{carrier:24}{row['ms']:8.1f}{ratio}")


def draw_plot(results: list[dict[str, Any]]) -> None:
    """One panel for each cell and number of ranks: time of every carrier beside its bound."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(7.5, 2.7 * len(results)), squeeze=False, layout="constrained")
    for axis, result in zip(axes[:, 0], results, strict=True):
        rows = result["rows"]
        base, raw = rows[EP1]["ms"], rows[RAW]["ms"]
        carriers = [carrier for carrier in rows if carrier not in (EP1, RAW)]
        axis.barh(["bound"], [base], color="0.45", label="ep = 1")
        axis.barh(["bound"], [raw], left=[base], color="0.75", label="raw exchange")
        axis.barh(carriers, [rows[carrier]["ms"] for carrier in carriers], color="tab:blue")
        for carrier in carriers:
            row, beside = rows[carrier], 1.01 * max(rows[carrier]["ms"], base + raw)  # not across the dashed line
            axis.text(beside, carrier, f"{row['ratio']:.2f}    {row['sent_mb']:.1f} MB", va="center", fontsize=8)
        axis.axvline(base + raw, color="0.45", linewidth=0.8, linestyle="--")
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"cell {result['cell']}: {result['shape']}; {result['ranks']} ranks", loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("forward + backward of one layer, ms; labels: time / bound, bytes a rank sends forward")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    for suffix in ("svg", "png"):
        figure.savefig(PLOTS / f"dispatch.{suffix}", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--only", nargs="+", choices=list(CARRIERS), default=list(CARRIERS))
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each contestant")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--bf16", action="store_true", help="instead of fp32")
    parser.add_argument("--no-plot", action="store_true", help="only print")
    args = parser.parse_args()
    restart_like_a_launch_script()

    PLOTS.mkdir(exist_ok=True)
    kept, found = PLOTS / "dispatch.json", PLOTS / "dispatch.part.json"
    results = {
        (r["cell"], r["ranks"]): r for r in (json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else [])
    }
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    for name in args.cells:
        for ranks in args.ranks:
            cell = replace(CELLS[name], tokens=args.tokens)
            spawn(measure, ranks, name, cell, args.only, args.rounds, args.warm_up, dtype, str(found))
            results[name, ranks] = json.loads(found.read_text(encoding="utf-8"))
            found.unlink()
            show(results[name, ranks])
    if not args.no_plot:
        ordered = [results[key] for key in sorted(results)]
        kept.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        draw_plot(ordered)


if __name__ == "__main__":
    main()
