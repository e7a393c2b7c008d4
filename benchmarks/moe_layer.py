"""One MoE layer beside other systems' and beside its dense bound: `python benchmarks/moe_layer.py`.

Forward and backward of our whole layer (router, capacity rule, dispatch, experts, losses), of peers' layers with the
same weights (benchmarks/peers.py), and of a dense MLP that does the arithmetic of the chosen experts with no router:
the bound. Contestants take turns, on new tokens every round, since other row counts per expert are part of the work.
Before timing, ours is compared with plain maths, and so is every peer that follows the cell's rules in fp32.

Cells: shapes (a) and (b) of benchmarks/cells.py, dropless and capacity factor 1.25, fp32 and bf16, 4096 tokens; and
dropless with 128 tokens, where reading and writing the experts' weights is all the work. GFLOP/s count the chosen
experts' products, nothing dropped; their share is of the largest rate of one product on this machine.

Results are added to plots/moe_layer.json, cell by cell; `--plot` draws them.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Weights, plain
from peers import Contestant, contestants
from race import device_name, profile, race, restart_like_a_launch_script, versions
from torch import Tensor

from moe_dist.train.record.profile import matmul_peak

HERE = Path(__file__).resolve().parent
Batch = tuple[Tensor, Tensor]  # x_TD and the gradient of y_TD
RULES = {"dropless": None, "capacity": 1.25}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def all_cells(letters: str, precisions: list[str], sizes: list[int], rules: list[str]) -> Iterator[Cell]:
    for letter in letters:
        for precision in precisions:
            for tokens in sizes:
                for rule in rules:
                    if rule == "dropless" or tokens >= 1024:
                        yield Cell(letter, precision, RULES[rule], tokens)


def training(contestant: Contestant) -> Callable[[Batch], None]:
    """Forward and backward; gradients are thrown away, as an optimizer would after its update."""
    layer = contestant.layer.train()

    def step(batch: Batch) -> None:
        x_TD, grad_TD = batch
        x_TD = x_TD.detach().requires_grad_()
        y_TD, aux = layer(x_TD)
        outputs, grads = ([y_TD], [grad_TD]) if aux is None else ([y_TD, aux], [grad_TD, torch.ones_like(aux)])
        torch.autograd.backward(outputs, grads)
        layer.zero_grad(set_to_none=True)

    return step


def check(cell: Cell, w: Weights, entrants: dict[str, Contestant], x_TD: Tensor) -> None:
    """Ours equals the plain maths in every cell; peers in fp32, where they follow its rules."""
    expected_TD = plain(cell, w, x_TD)
    for name, entrant in entrants.items():
        if entrant.exact and (name.startswith("moe_dist") or cell.precision == "fp32"):
            y_TD = entrant.layer(x_TD)[0].detach().float()
            error = float((y_TD - expected_TD).norm() / expected_TD.norm())
            assert error <= TOLERANCE[cell.precision], f"{cell.name}: {name} is off by {error:.1e}"


def run(cell: Cell, steps: int, warm_up: int, device: torch.device, profiled: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    w = Weights.random(cell, generator).to(device)
    shape = (cell.tokens, cell.shape.d_model)

    def draw() -> Batch:
        x_TD, grad_TD = (torch.randn(shape, generator=generator).to(device, cell.dtype) for _ in range(2))
        return x_TD, grad_TD

    entrants = contestants(cell, w, device)
    check(cell, w, entrants, draw()[0])
    runners = {name: training(entrant) for name, entrant in entrants.items()}
    # Measured on CPU: before and after, so that one bad moment does not count.
    before = matmul_peak(device, cell.dtype).flops_per_second
    seconds = race(runners, draw, steps, warm_up)
    peak = max(before, matmul_peak(device, cell.dtype).flops_per_second)
    if profiled:
        profile(runners["moe_dist"], draw)
    return {
        "cell": cell.name,
        "title": cell.shape.title,
        "flops": cell.flops,
        "peak": peak,
        "seconds": seconds,
        "notes": {name: entrant.note for name, entrant in entrants.items() if entrant.note},
    }


def show(result: dict[str, Any]) -> None:
    seconds, notes = result["seconds"], result["notes"]
    print(f"\n{result['cell']}; {result['title']}")
    print(f"{'':32}{'ms':>8}{'/ bound':>9}{'GFLOP/s':>9}{'of peak':>9}")
    for name, s in sorted(seconds.items(), key=lambda item: item[1]):
        rate = result["flops"] / s
        numbers = f"{s * 1e3:8.1f}{s / seconds['dense bound']:9.2f}{rate / 1e9:9.0f}{rate / result['peak']:9.0%}"
        print(f"{name:32}{numbers}  {notes.get(name, '')}", flush=True)


def machine(steps: int) -> dict[str, Any]:
    packages = versions("torch", "deepspeed", "megatron-core", "transformers", "st-moe-pytorch", "scattermoe")
    return {"device": device_name(), "threads": torch.get_num_threads(), "steps": steps, "versions": packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="ab", help="letters of benchmarks/cells.py")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 128])
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--steps", type=int, default=12, help="measured rounds")
    parser.add_argument("--warm-up", type=int, default=4, help="rounds before them")
    parser.add_argument("--profile", action="store_true", help="also print where our layer's time goes")
    parser.add_argument("--json", type=Path, default=HERE / "plots/moe_layer.json")
    parser.add_argument("--plot", action="store_true", help="only draw what is in the JSON file")
    args = parser.parse_args()
    if args.plot:
        from plots import draw_cells

        draw_cells(json.loads(args.json.read_text(encoding="utf-8")), HERE / "plots/moe_layer")
        return
    restart_like_a_launch_script()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = machine(args.steps)
    print(", ".join(f"{k} {v}" for k, v in where["versions"].items()))
    print(f"{where['device']}, {where['threads']} threads; median of {args.steps} rounds")
    results = json.loads(args.json.read_text(encoding="utf-8"))["cells"] if args.json.exists() else {}
    for cell in all_cells(args.shapes, args.precision, args.tokens, args.rules):
        torch.manual_seed(0)
        result = run(cell, args.steps, args.warm_up, device, args.profile)
        show(result)
        results[cell.name] = result
        args.json.write_text(json.dumps({"machine": where, "cells": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
