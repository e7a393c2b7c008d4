"""One MoE layer on a GPU beside other systems': bf16, forward and backward, at the shapes of well-known models.

Shapes m, q, o, s of benchmarks/cells.py with 8k and 32k tokens, even and skewed loads, dropless. Each contestant is
measured alone: milliseconds by CUDA events (median, inputs in turns), the share of this GPU's measured matmul rate that
the chosen experts' products make of it, and the memory that a step needs beyond weights and inputs. Outputs at 8k are
compared with plain maths in fp32, but for Transformers', whose routers choose in bf16. Prints a Markdown row as soon as
it is known; `--json FILE` keeps the numbers.
"""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from cells import Cell, Weights, plain
from gpu_machine import matmul_rate, seconds_of, section_parser
from moe_layer import training
from peers import Contestant, Dense, Liger, Mixtral, Ours, Scatter, SortedGroupedMM, Switch
from torch import Tensor

Makers = dict[str, Callable[[], Contestant]]
TOLERANCE = 3e-2


def cells(rehearse: bool) -> Iterator[Cell]:
    """The most telling first, for a run that is stopped early."""
    sizes = (64,) if rehearse else (8192, 32768)
    for skewed, tokens in [(skewed, tokens) for skewed in (False, True) for tokens in sizes]:
        for letter in "t" if rehearse else "qoms":
            yield Cell(letter, "fp32" if rehearse else "bf16", None, tokens, skewed)


def makers(cell: Cell, w: Weights, device: torch.device) -> Makers:
    """Who can run the cell."""
    found: Makers = {"moe_dist": lambda: Contestant(Ours(cell, w, device))}
    if find_spec("triton"):
        found["moe_dist, experts triton"] = lambda: Contestant(Ours(cell, w, device, experts="triton"))
    found["sort + grouped_mm"] = lambda: Contestant(SortedGroupedMM(cell, w))
    if find_spec("transformers"):
        if w.gate is not None:
            found["Transformers grouped_mm"] = lambda: Contestant(Mixtral(cell, w, "grouped_mm"), exact=False)
        elif cell.shape.top_k == 1:
            found["Transformers Switch"] = lambda: Contestant(Switch(cell, w), exact=False)
    if device.type == "cuda":
        if find_spec("liger_kernel") and w.gate is not None:
            # Its autotuner compiles some 150 kernels a shape: minutes. Its own switch pins one choice of blocks.
            os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
            found["Liger-Kernel, autotuning off"] = lambda: Contestant(Liger(cell, w))
        if find_spec("scattermoe"):
            found["ScatterMoE"] = lambda: Contestant(Scatter(cell, w))
    return found | {"dense bound": lambda: Contestant(Dense(cell, w), exact=False)}


def measured(
    contestant: Contestant, batches: list[tuple[Tensor, Tensor]], device: torch.device, rounds: int, warm_up: int
) -> dict[str, float]:
    step, turn = training(contestant), iter(range(10**9))
    step(batches[0])
    held, peak = 0, 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    step(batches[0])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - held
    seconds = seconds_of(lambda: step(batches[next(turn) % len(batches)]), device, rounds, warm_up)
    return {"seconds": seconds, "peak_bytes": peak}


def error_of(contestant: Contestant, cell: Cell, w: Weights, x_TD: Tensor) -> float:
    expected_TD = plain(cell, w, x_TD)
    with torch.no_grad():
        y_TD = contestant.layer(x_TD)[0].float()
    return float((y_TD - expected_TD).norm() / expected_TD.norm())


def run(cell: Cell, device: torch.device, rate: float, rounds: int, warm_up: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    w = Weights.random(cell, generator)
    batches = [
        (w.inputs(cell, generator), torch.randn_like(w.inputs(cell, generator))) for _ in range(2 if rounds < 5 else 3)
    ]
    rows: dict[str, Any] = {}
    for name, make in makers(cell, w, device).items():
        began = time.monotonic()
        try:
            contestant = make()
            row: dict[str, Any] = measured(contestant, batches, device, rounds, warm_up)
            row["share_of_peak"] = cell.flops / row["seconds"] / rate
            if contestant.exact and cell.tokens <= 8192 and not cell.skewed:
                row["error"] = error_of(contestant, cell, w, batches[0][0])
                assert row["error"] < TOLERANCE, f"is off by {row['error']:.1e}"
            rows[name] = row
        except Exception as failure:  # a peer that cannot do the cell must not hide the others
            rows[name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
        rows[name]["wall_seconds"] = time.monotonic() - began
        print(markdown(cell, name, rows[name]), flush=True)
        contestant = None
        gc.collect()
        torch.cuda.empty_cache()
    return {"title": cell.shape.title, "flops": cell.flops, "contestants": rows}


def markdown(cell: Cell, name: str, row: dict[str, Any]) -> str:
    """A contestant's row of the table."""
    if "failed" in row:
        return f"| {cell.name} | {name} | failed: {row['failed']} | | | |".replace("\n", " ")
    error = f"{row['error']:.1e}" if "error" in row else ""
    numbers = f"{1e3 * row['seconds']:.2f} | {row['share_of_peak']:.0%} | {row['peak_bytes'] / 2**30:.2f} | {error}"
    return f"| {cell.name} | {name} | {numbers} |"


def main() -> None:
    parser = section_parser(__doc__)
    own = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if own.rehearse else torch.bfloat16
    rate = matmul_rate(device, dtype, 256 if own.rehearse else 8192)
    found: dict[str, Any] = {"matmul_flops_per_second": rate, "cells": {}}
    print(f"Products of 8192 run at {rate / 1e12:.3g} TFLOP/s here; shares are of that.\n")
    print("| cell | layer | ms | of peak | GiB a step | error |\n|---|---|---|---|---|---|", flush=True)
    for cell in cells(own.rehearse):
        found["cells"][cell.name] = run(cell, device, rate, *((1, 0) if own.rehearse else (8, 2)))
        if own.json:
            own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    ours = [row for result in found["cells"].values() for name, row in result["contestants"].items() if "moe_" in name]
    broken = [row["failed"] for row in ours if "failed" in row]
    if broken:
        raise SystemExit("moe_dist failed: " + "; ".join(broken))


if __name__ == "__main__":
    main()
