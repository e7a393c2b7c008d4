"""Where an MoE layer and a training step on a GPU wait for the host, and where the time of a layer goes.

Counts the places of our code at which torch synchronises (torch.cuda.set_sync_debug_mode): in one layer, forward and
backward, and in a whole step of a decoder, under each choice of experts and each of RULES. A layer whose experts are in
FREE must not wait at all: exit code 1 if one does. A step waits once, for the gradient norm. Then profiles one layer.
Prints Markdown; `--json FILE` keeps the numbers. A part of launch/gpu.sh.
"""

import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Weights
from gpu_machine import seconds_of, section_parser
from moe_layer import training
from peers import Contestant, Ours
from torch.autograd import DeviceType

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.schema import EngineConfig, OptimConfig
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
FREE = ("grouped_mm", "triton")
RULES: dict[str, dict[str, Any]] = {
    "dropless": {"capacity_factor": None},
    "capacity 1.25": {"capacity_factor": 1.25},
    "capacity 1.25, wire padded": {"capacity_factor": 1.25, "dispatch": "all_to_all", "wire": "padded"},
}


def waits_of(call: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """waits of one warm call, and {place in our code: how often the host waited there}."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            places[place_of(traceback.extract_stack()[:-1])] += 1

    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum(places.values()), "places": dict(places.most_common())}


def layer(cell: Cell, device: torch.device, **moe: Any) -> Callable[[], None]:
    """One forward and backward of our layer, warm."""
    generator = torch.Generator(device).manual_seed(0)
    w = Weights.random(cell, generator)
    step = training(Contestant(Ours(cell, w, device, **moe)))
    batch = (w.inputs(cell, generator), w.inputs(cell, generator))
    for _ in range(WARM_UP):
        step(batch)
    return lambda: step(batch)


def decoder_step(moe: dict[str, Any], device: torch.device, rehearse: bool) -> Callable[[], None]:
    """One micro-step and update of a decoder."""
    layers, width, rows, length = (2, 32, 2, 16) if rehearse else (4, 1024, 8, 1024)
    moe_config = MoEConfig(num_experts=8, top_k=2, d_ff=2 * width, **moe)
    model = ModelConfig(d_model=width, num_layers=layers, num_heads=8, d_ff=2 * width, moe=moe_config)
    model = resolve_backends(model, 1, device.type, length)
    mesh, precision = single_process_mesh(), "bf16" if device.type == "cuda" else "fp32"
    engine = make_engine(
        Decoder(model, mesh).to(device), mesh, EngineConfig(precision=precision), OptimConfig(), rows, 1
    )
    ids = torch.randint(model.vocab_size, (rows, length + 1), device=device)

    def step() -> None:
        engine.micro_step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), StepContext(RandomKey.of("waits")))
        engine.update(1e-4)

    return step


def place_of(stack: traceback.StackSummary) -> str:
    """The innermost line of ours."""
    for frame in reversed(stack):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and file.name != Path(__file__).name:
            return f"{file.relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "outside of moe_dist (backward: " + " < ".join(frame.name for frame in list(reversed(stack))[:4]) + ")"


def profile_of(cell: Cell, experts: str, device: torch.device) -> list[tuple[str, float, int]]:
    """(kernel, milliseconds a step, calls a step) of our layer, longest first."""
    step = layer(cell, device, experts=experts)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA, *activities]
    rounds = 3
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(rounds):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_gpu = device.type == "cuda"
    kernels = [event for event in profiler.key_averages() if (event.device_type == DeviceType.CUDA) == on_gpu]
    times = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / rounds, event.count)
        for event in kernels
    ]
    return [(name, ms, count // rounds) for name, ms, count in sorted(times, key=lambda row: -row[1])[:18]]


def tell(name: str, more: str, row: dict[str, Any]) -> None:
    print(f"**{name}**: {more}{row['waits']} waits\n")
    if row["places"]:
        print("".join(f"- {count} x `{place}`\n" for place, count in row["places"].items()), flush=True)


def main() -> None:
    parser = section_parser(__doc__)
    own = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"layers": {}, "steps": {}, "profiles": {}}
    backends = ("grouped_mm", "bmm", "triton") if device.type == "cuda" else ("grouped_mm", "bmm")
    kinds = [(f"experts {e}, {rule}", options | {"experts": e}) for e in backends for rule, options in RULES.items()]
    small = Cell("t", "fp32", None, 64) if own.rehearse else Cell("b", "bf16", None, 4096)
    for name, moe in kinds:
        found["layers"][name] = row = waits_of(layer(small, device, **moe), device)
        tell(f"one layer, {name}", "", row)
    for name, moe in kinds:
        step = decoder_step(moe, device, own.rehearse)
        ms = 1e3 * seconds_of(step, device, 6, WARM_UP)
        found["steps"][name] = row = {"ms": ms} | waits_of(step, device)
        tell(f"a step, {name}", f"{ms:.2f} ms, ", row)
    cell = Cell("t", "fp32", None, 64) if own.rehearse else Cell("q", "bf16", None, 8192)
    for experts in ("grouped_mm",) if own.rehearse else ("grouped_mm", "triton"):
        found["profiles"][experts] = kernels = profile_of(cell, experts, device)
        print(f"\n{cell.name}, experts {experts}: {sum(ms for _, ms, _ in kernels):.2f} ms a step\n")
        print("| kernel | ms | calls |\n|---|---|---|")
        print("\n".join(f"| `{name[:90]}` | {ms:.3f} | {count} |" for name, ms, count in kernels), flush=True)
    if own.json:
        own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    waiting = [name for name, moe in kinds if moe["experts"] in FREE and found["layers"][name]["waits"]]
    if waiting:
        raise SystemExit("layers wait for the host that must not: " + "; ".join(waiting))


if __name__ == "__main__":
    main()
