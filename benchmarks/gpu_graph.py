"""Training steps launched kernel by kernel, and replayed as CUDA graphs (engine.cuda_graph): times, and the same bits.

Each row trains the same model twice from the same start on the same tokens: steps of two micro-steps, native engine,
bf16. Prints Markdown; `--json FILE` keeps the numbers; exit code 1 when weights differ. A part of launch/gpu.sh;
without a GPU, `--rehearse` trains once and replays nothing.
"""

import json
import sys
from typing import Any

import torch
from gpu_machine import seconds_of, section_parser

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.base import Engine
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

MICRO_STEPS, CHECKED, WARM_UP = 2, 8, 5
# name: (d_model, layers, heads, rows, tokens of a row, experts, top_k, width of an expert, limit, more)
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, float | None, dict[str, Any]]] = {
    "quickstart's size, capacity 1.25": (256, 4, 8, 8, 256, 8, 2, 512, 1.25, {}),
    "quickstart's size, dropless": (256, 4, 8, 8, 256, 8, 2, 512, None, {}),
    "Switch-Base, 64 experts, capacity 1.25": (768, 6, 12, 8, 512, 64, 1, 3072, 1.25, {}),
    "64 experts, top-8, padded wire": (
        1024,
        6,
        16,
        8,
        512,
        64,
        8,
        512,
        1.25,
        dict(dispatch="all_to_all", wire="padded"),
    ),
}
TINY = (32, 1, 2, 2, 16, 4, 2, 32, 1.25, {})


def step_of(shape: Any, device: torch.device, graph: bool) -> tuple[Any, Engine]:
    """(a training step, the engine), from the same weights and tokens each time."""
    d_model, layers, heads, rows, length, experts, top_k, width, factor, more = shape
    moe = MoEConfig(num_experts=experts, top_k=top_k, d_ff=width, capacity_factor=factor, **more)
    model = ModelConfig(d_model=d_model, num_layers=layers, num_heads=heads, d_ff=width, moe=moe)
    model = resolve_backends(model, 1, device.type, length)
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    settings = EngineConfig(precision=precision, cuda_graph=graph)
    mesh = single_process_mesh()
    engine = make_engine(Decoder(model, mesh).to(device), mesh, settings, OptimConfig(), rows, MICRO_STEPS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (MICRO_STEPS, rows, length + 1), generator=generator).to(device)

    def step() -> None:
        for own in ids:
            context = StepContext(RandomKey.of("graph"))
            engine.micro_step(own[:, :-1].contiguous(), own[:, 1:].contiguous(), context)
        engine.update(1e-3)

    return step, engine


def measured(shape: Any, device: torch.device, graph: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """(seconds of a step, weights after the first steps)."""
    step, engine = step_of(shape, device, graph)
    for _ in range(CHECKED):
        step()
    weights = {name: value.detach().clone() for name, value in engine.model.state_dict().items()}
    return seconds_of(step, device, 10, WARM_UP), weights


def compared(shape: Any, device: torch.device) -> dict[str, Any]:
    launched, weights = measured(shape, device, graph=False)
    if device.type != "cuda":
        return {"launched_ms": 1e3 * launched}
    replayed, others = measured(shape, device, graph=True)
    same = all(torch.equal(value, others[name]) for name, value in weights.items())
    return {"launched_ms": 1e3 * launched, "replayed_ms": 1e3 * replayed, "same_bits": same}


def main() -> int:
    parser = section_parser(__doc__)
    own = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {}
    print("| model | launched, ms | replayed, ms | faster | same bits |\n|---|---|---|---|---|")
    for name, shape in ({"tiny": TINY} if own.rehearse else SHAPES).items():
        found[name] = row = compared(shape, device)
        if own.json:
            own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if "replayed_ms" in row:
            faster = f"{row['launched_ms'] / row['replayed_ms']:.2f}"
            print(f"| {name} | {row['launched_ms']:.2f} | {row['replayed_ms']:.2f} | {faster} | {row['same_bits']} |")
        else:
            print(f"| {name} | {row['launched_ms']:.2f} | | | |")
        sys.stdout.flush()
    return 0 if all(row.get("same_bits", True) for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
