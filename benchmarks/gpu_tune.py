"""Which blocks the experts' Triton kernels want on this GPU: every kernel's candidates, the others as they are.

For bf16 at shapes of benchmarks/cells.py and 8k tokens, even loads. Prints, kernel by kernel, milliseconds of forward
and backward of the experts alone with each candidate, the best first; `--json FILE` keeps them. What is best goes into
kernels/grouped_mm/tiles.py by hand. Kernels are compiled by several processes first, then timed by one.

Not part of a plain launch/gpu.sh: `launch/gpu.sh --sections h`.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from cells import SHAPES
from gpu_machine import seconds_of, section_parser

from moe_dist.kernels.grouped_mm.tiles import ExpertTiling, ProductBlock, choose_expert_tiling
from moe_dist.kernels.grouped_mm.triton import feed_forward
from moe_dist.kernels.grouped_mm.weights import ExpertWeights
from moe_dist.kernels.permute.order import RowOrder

KERNELS = ("up", "down", "hidden_grad", "input_grad", "up_grad", "out_grad")
CANDIDATES = {
    "up": [(128, 64, 8, 3, True), (128, 64, 8, 4, True), (64, 64, 4, 4, False), (128, 32, 8, 4, True)],
    "down": [(256, 64, 8, 3, False), (128, 64, 8, 3, False), (128, 64, 4, 4, False), (256, 64, 8, 4, False)],
    "hidden_grad": [(128, 64, 8, 4, True), (128, 64, 8, 3, True), (128, 64, 8, 3, False), (128, 64, 4, 3, True)],
    "input_grad": [(256, 64, 8, 3, False), (128, 64, 8, 3, False), (128, 64, 4, 4, False), (256, 64, 8, 4, False)],
    "up_grad": [(128, 64, 8, 3, False), (128, 64, 8, 4, False), (128, 32, 8, 4, False), (64, 64, 4, 3, False)],
    "out_grad": [(256, 64, 8, 3, False), (128, 64, 8, 4, False), (128, 64, 4, 3, False), (256, 32, 8, 4, False)],
}
WORKERS = 8


def tilings(start: ExpertTiling, kernels: list[str]) -> Iterator[tuple[str, str, ExpertTiling]]:
    """(kernel, candidate, tiling), each with one kernel's blocks changed; first everything as it is."""
    yield "", "as it is", start
    for sizes in ({"rows": 64}, {"grad_rows": 64}, {"grad_rows": 256, "up_grad": ProductBlock(64, 64, 8, 3)}):
        yield "tiles", ", ".join(f"{name} {size}" for name, size in sizes.items()), replace(start, **sizes)
    for kernel in kernels:
        for n, k, warps, stages, split in CANDIDATES[kernel]:
            block = ProductBlock(n, k, warps, stages, split)
            if block != getattr(start, kernel):
                yield (
                    kernel,
                    f"n {n}, k {k}, {warps} warps, {stages} stages{', halves' * split}",
                    replace(start, **{kernel: block}),
                )


class Experts:
    """Forward and backward of one shape's experts, with any tiling."""

    def __init__(self, letter: str, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = SHAPES[letter]
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return (torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5).to(dtype).requires_grad_()

        matrices = [draw(shape.experts, shape.d_ff, shape.d_model) for _ in range(3)]
        gate = matrices[0] if shape.activation == "swiglu" else None
        self.activation = shape.activation
        self.w = ExpertWeights(gate, matrices[1], matrices[2], None, None, None)
        self.x_XD, self.grad_XD = draw(tokens, shape.d_model), draw(tokens, shape.d_model).detach()
        scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
        experts_XK = scores.topk(shape.top_k).indices
        self.weights_XK = torch.rand(experts_XK.shape, generator=generator, device=device).requires_grad_()
        self.order = RowOrder.of(experts_XK, torch.ones_like(experts_XK, dtype=torch.bool), shape.experts)
        self.tiling = choose_expert_tiling(dtype, experts_XK.numel(), shape.experts, shape.d_model, shape.d_ff)

    def step(self, tiling: ExpertTiling) -> None:
        y_XD = feed_forward(self.x_XD, self.weights_XK, self.order, self.w, self.activation, tiling=tiling)
        leaves = [t for t in (self.x_XD, self.weights_XK, *self.w) if t is not None]
        torch.autograd.grad(y_XD, leaves, self.grad_XD)


def compile_kernels(letter: str, tokens: int, kernels: list[str]) -> None:
    """Run each candidate once, in a process of its own; what Triton compiles stays on disk."""
    device = torch.device("cuda", 0)
    experts = Experts(letter, tokens, device, torch.bfloat16)
    for _, _, tiling in tilings(experts.tiling, kernels):
        try:
            experts.step(tiling)
        except Exception as failure:  # too much shared memory, say: it will be told when timed
            print(f"{letter} {tiling}: {type(failure).__name__}")
    torch.cuda.synchronize()


def timed(
    experts: Experts, device: torch.device, rounds: int, warm_up: int, kernels: list[str]
) -> Iterator[dict[str, Any]]:
    for kernel, name, tiling in tilings(experts.tiling, kernels):
        row: dict[str, Any] = {"kernel": kernel, "blocks": name}
        try:
            row["ms"] = 1e3 * seconds_of(lambda tiling=tiling: experts.step(tiling), device, rounds, warm_up)
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:120]
        yield row


def main() -> None:
    parser = section_parser(__doc__)
    parser.add_argument("--letters", default="qm", help="shapes of benchmarks/cells.py")
    own = parser.parse_args()
    if own.rehearse:
        device, letters, tokens, dtype = torch.device("cpu"), "t", 8, torch.float32
    else:
        device, letters, tokens, dtype = torch.device("cuda", 0), own.letters, 8192, torch.bfloat16
        began, jobs = time.monotonic(), [(letter, tokens, [kernel]) for letter in letters for kernel in KERNELS]
        with multiprocessing.get_context("spawn").Pool(min(WORKERS, os.cpu_count() or 1)) as pool:
            pool.starmap(compile_kernels, jobs, chunksize=1)
        print(f"Compiled in {time.monotonic() - began:.0f} s.\n", flush=True)
    found: dict[str, Any] = {}
    for letter in letters:
        experts = Experts(letter, tokens, device, dtype)
        print(f"\n{SHAPES[letter].title}, {tokens} tokens; as it is: {experts.tiling}\n")
        print("| kernel | blocks | ms |\n|---|---|---|", flush=True)
        found[letter] = []
        rounds, warm_up, kernels = (1, 0, ["up"]) if own.rehearse else (10, 2, list(KERNELS))
        for row in timed(experts, device, rounds, warm_up, kernels):
            found[letter].append(row)
            print(
                f"| {row['kernel']} | {row['blocks']} | {row.get('failed') or format(row['ms'], '.3f')} |", flush=True
            )
            if own.json:
                own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
